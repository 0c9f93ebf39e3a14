"""What a recipe says about where data comes from: one source, or a mixture of several."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Format = Literal["llava", "webdataset", "parquet"]

_SUFFIXES: dict[str, Format] = {".tar": "webdataset", ".tgz": "webdataset", ".parquet": "parquet"}
_TAKE = re.compile(r"(first|last|end|random):([0-9]+(?:\.[0-9]+)?)(%?)")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SourceOptions(Section):
    """Options of `builtin:shapes`."""

    style: Literal["terse", "ornate", "qa"] = Field(
        "ornate", description="plain captions; captions with as much again that the image does not show; questions"
    )
    split: Literal["train", "heldout", "heldout_pairs"] = Field(
        "train",
        description="their scenes differ; heldout_pairs: with pairs of shape and colour that no other split shows",
    )
    size: int = Field(2000, gt=0, description="number of scenes (samples)")
    seed: int = Field(0, ge=0, description="what scenes are drawn from")


class ColumnsSection(Section):
    """What of a Parquet or WebDataset sample is what; each is found by the usual names where it is not given."""

    image: str | None = Field(None, min_length=1, description="column; in a tar the members' ending: jpg, *.jpg")
    text: str | None = Field(None, min_length=1, description="the caption or answer: column, ending, or key of .json")
    prompt: str | None = Field(None, min_length=1, description="what is asked before `text`: as text")
    conversations: str | None = Field(None, min_length=1, description="turns as LLaVA has them, or role and content")
    id: str | None = Field(None, min_length=1, description="column, or key of .json")

    @model_validator(mode="after")
    def _one_kind(self) -> ColumnsSection:
        if self.conversations is not None and (self.text is not None or self.prompt is not None):
            raise ValueError("expected conversations or text (with prompt), found both")
        if self.prompt is not None and self.text is None:
            raise ValueError("expected text (the answer) beside prompt, found none")
        return self


class Origin(Section):
    """What a source and an entry of a mixture have in common."""

    images: str | None = Field(None, description="folder that image names are relative to; default: the source's own")
    format: Format | None = Field(None, description="default: by the file's name; a folder needs it, unless llava")
    columns: ColumnsSection | None = Field(None, description="of Parquet and WebDataset")
    options: SourceOptions | None = Field(None, description="of builtin:shapes, which takes nothing else")

    def check_uri(self, uri: str) -> None:
        """Raises: ValueError where keys do not go together with one source at `uri`."""
        if uri.startswith("builtin:"):
            if uri != "builtin:shapes":
                raise ValueError(f"expected builtin:shapes, found {uri}")
            if self.images is not None or self.format is not None or self.columns is not None:
                raise ValueError("a builtin source takes options, not images, format or columns")
            return
        if self.options is not None:
            raise ValueError("options belong to builtin sources only")
        kind = self.format or format_of(uri)
        if kind == "llava" and self.columns is not None:
            raise ValueError("columns belong to parquet and webdataset only: a LLaVA record has fixed keys")
        if kind == "webdataset" and self.images is not None:
            raise ValueError("images does not belong to webdataset: a tar holds its images")


class SourceEntry(Origin):
    """One source of a mixture."""

    source: str = Field(min_length=1, description="URI of the data, or builtin:shapes")
    take: str | None = Field(None, description="first:N, last:N or random:N of its rows; N may be a percentage: 10%")
    weight: float = Field(
        1.0, ge=0.001, le=1000, description="how often each sample comes in an epoch; 0.5: half of them"
    )

    @field_validator("take")
    @classmethod
    def _take_is_known(cls, take: str | None) -> str | None:
        if take is not None:
            parse_take(take)
        return take

    @model_validator(mode="after")
    def _keys_fit(self) -> SourceEntry:
        if is_mixture_file(self.source):
            raise ValueError(f"expected a source in a mixture, found another mixture: {self.source}")
        self.check_uri(self.source)
        return self


def _kind_of(value: Any) -> str:
    return "<entries>" if isinstance(value, list) else "<uri>"


class SourceSection(Origin):
    """One source (a URI, or builtin:shapes), or several: a list of entries, or a .yaml file as LLaVA-NeXT has them."""

    source: Annotated[
        Annotated[str, Field(min_length=1), Tag("<uri>")]
        | Annotated[list[SourceEntry], Field(min_length=1), Tag("<entries>")],
        Discriminator(_kind_of),
    ] = Field(description="URI of the data, builtin:shapes, a list of sources, or a .yaml mixture")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the samples used, chosen by the seed")
    image_aspect: Literal["crop", "pad", "stretch"] | None = Field(
        None, description="how an image becomes square; default: crop in pretrain, pad in instruct"
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> SourceSection:
        if isinstance(self.source, list):
            if any(value is not None for value in (self.images, self.format, self.columns, self.options)):
                raise ValueError("a list of sources has images, format, columns and options in its entries")
        elif is_mixture_file(self.source):
            if any(value is not None for value in (self.format, self.columns, self.options)):
                raise ValueError("a .yaml mixture takes images; format, columns and options belong to single sources")
        else:
            self.check_uri(self.source)
        return self

    @property
    def label(self) -> str:
        """The source in a message."""
        return self.source if isinstance(self.source, str) else f"a mixture of {len(self.source)} sources"


def format_of(uri: str) -> Format:
    """A source's format by its name."""
    return _SUFFIXES.get(PurePosixPath(uri).suffix.lower(), "llava")


def is_mixture_file(uri: str) -> bool:
    return uri.lower().endswith((".yaml", ".yml"))


def parse_take(take: str) -> tuple[str, float, bool]:
    """(first, last or random; the number; is it a percentage?). Raises: ValueError."""
    found = _TAKE.fullmatch(take.strip())
    if found is None:
        raise ValueError(f"expected first:N, last:N or random:N, where N may be a percentage like 10%, found {take!r}")
    kind, text, percent = found.groups()
    number = float(text)
    if number <= 0 or (percent and number > 100) or (not percent and not number.is_integer()):
        raise ValueError(f"expected a whole number above 0, or a percentage up to 100%, found {take!r}")
    return "last" if kind == "end" else kind, number, bool(percent)
