"""One HTML file of what came of a run, of several runs side by side, or of a sweep; it needs nothing but a browser.

    python jobs/report.py URI [URI ...] [--output FILE]

URI is the folder of a run or a sweep: STORE/runs/NAME (several may be given) or STORE/sweeps/NAME. Exit code 0: done;
1: failed; 2: the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a working directory that `ray job submit` brought is not installed
    sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="Exit 0 done, 1 failed, 2 wrong arguments.",
    )
    parser.add_argument("uris", nargs="+", metavar="URI", help="STORE/runs/NAME (one or several) or STORE/sweeps/NAME")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's or sweep's folder; of several, here",
    )
    arguments = parser.parse_args(argv)

    from dpa_ray.engine.reporting import FILE, NotAPlace, Place, page, write_report
    from dpa_ray.errors import UserError

    try:
        places = [Place.of(uri) for uri in arguments.uris]
        output = arguments.output or (Path(FILE) if len(places) > 1 else None)
        if output is None:
            print(write_report(places[0]))
        else:
            output.write_text(page(places), encoding="utf-8")
            print(output.absolute())
    except NotAPlace as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except (UserError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    from dpa_ray.leaving import leave

    leave(code)
