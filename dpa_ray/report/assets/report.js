"use strict";
// Draws the figures in the page's own colours, and sorts tables by any column.
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function config() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const ink = of("--ink"), quiet = of("--quiet"), line = of("--line"), font = of("--font");
    return {
      background: "transparent",
      font,
      axis: { labelColor: quiet, titleColor: ink, gridColor: line, domainColor: line, tickColor: line,
              labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, labelOverlap: true },
      legend: { labelColor: ink, titleColor: ink, orient: "bottom", labelFontSize: 12, titleFontSize: 12,
                columns: Math.max(1, Math.floor(document.documentElement.clientWidth / 170)), labelLimit: 280 },
      view: { stroke: null },
      line: { strokeWidth: 2 },
      rule: { color: ink },
      text: { color: ink, fontSize: 12 },
      point: { color: of("--accent") },
      rect: { cornerRadius: 2 },
      range: { category: [1, 2, 3, 4, 5, 6, 7, 8].map((i) => of(`--series-${i}`)),
               heatmap: { scheme: "viridis" }, ramp: { scheme: "plasma", extent: dark.matches ? [0.3, 1] : [0, 0.65] } },
      aria: false, // the figure's caption and its table say it to a screen reader
    };
  }

  async function draw() {
    for (const place of document.querySelectorAll("[data-spec]")) {
      const name = place.dataset.spec;
      const canvas = document.createElement("div");
      place.replaceChildren(canvas);
      try {
        await vegaEmbed(canvas, structuredClone(specs[name]), {
          renderer: "svg", actions: false, ast: true, config: config(), tooltip: { theme: dark.matches ? "dark" : "light" },
        });
      } catch (error) {
        console.error(`${name}: ${error}`); // the others are drawn, and its table has its data
        canvas.textContent = "This figure cannot be drawn; its data are in the table.";
        continue;
      }
      const picture = canvas.querySelector("svg");
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-labelledby", `title-${name}`);
    }
    document.documentElement.dataset.drawn = "yes";
  }

  function sort(table, button) {
    const header = button.closest("th");
    const column = [...header.parentElement.children].indexOf(header);
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentElement.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const words = new Intl.Collator(undefined, { numeric: true });
    const sign = ascending ? 1 : -1;
    const rank = (cell) => (cell.dataset.value !== undefined ? 0 : cell.textContent === "–" ? 2 : 1);
    const order = (a, b) => {
      const [x, y] = [a.children[column], b.children[column]];
      if (rank(x) !== rank(y)) return rank(x) - rank(y); // what has no value comes last either way
      if (rank(x) === 0) return sign * (Number(x.dataset.value) - Number(y.dataset.value));
      return sign * words.compare(x.textContent, y.textContent);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => sort(table, button));
    }
  }
  if (document.querySelector("[data-spec]")) {
    draw();
    dark.addEventListener("change", draw);
  } else {
    document.documentElement.dataset.drawn = "yes";
  }
})();
