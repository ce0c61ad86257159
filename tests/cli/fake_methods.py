"""Methods as the command line sees them: classes with fields."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class RTN(BaseModel):
    """Round to nearest.

    Details that a list does not show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = ""


class Omni(RTN):
    """Learn clipping and diagonals."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2308.13137"
    let: bool = Field(True, description="Learn the transformation.")
    lwc: bool = Field(True, description="Learn clipping.")
    epochs: int | None = Field(None, ge=1, description="Passes over the windows. Preset: 20.")
    parameters: str | None = Field(None, description="A file instead of training.")
    query_key: Literal["legal", "published"] = Field("legal", description="Under rotary embedding.")
    sites: tuple[str, ...] = Field(("attn_in", "mlp_in"), description="Where.")
    published_form: ClassVar[dict[str, str]] = {"query_key": "published"}

    @classmethod
    def presets(cls) -> dict[str, str]:
        return {"W4A4": "let, lwc, 20 epochs"}


class Affine(RTN):
    """Learn affine transformations."""

    let: bool = Field(True, description="Learn the transformation.")
    use_matrix: bool | None = Field(None, description="Per-head matrices.")
    sf: float | None = Field(None, gt=0, le=1, description="Stability factor.")
    epochs: int | None = Field(None, ge=1, description="Passes over the windows.")
    published: bool = Field(False, description="The published form.")
    seed_name: str = Field("2", description="A text that looks like a number.")
