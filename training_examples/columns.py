"""The arguments that name the columns of data, for all scripts that read data."""

from dataclasses import dataclass, field
from typing import Any

from modeling_prismer.processing.tasks import find_task


@dataclass(kw_only=True)
class ColumnOptions:
    """Names of columns; those that are not given are found by their usual names. A mixin of the arguments."""

    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of the images, or a path from columns: '{folder}/{name}.png'."},
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the captions, or of the questions.",
            "aliases": ["--caption_column", "--question_column"],
        },
    )
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answers."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the classes.", "aliases": ["--class_column"]}
    )
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the ids of images that are in the data set itself, as in a label store.",
            "aliases": ["--key_column"],
        },
    )
    split_column: str | None = field(
        default=None, metadata={"help": "Column with the name of the split; by default `split`, if it exists."}
    )

    def columns_of(self, task: str) -> dict[str, Any]:
        """The columns of a task, as arguments of `load_rows`."""
        roles = zip(find_task(task).columns, (self.text_column, self.answer_column))
        return {
            **{f"{role}_column": name for role, name in roles},
            "image_column": self.image_column,
            "class_column": self.label_column,
            "key_column": self.id_column,
            "split_column": self.split_column,
        }
