"""What an injection selects, as a table to print."""

from typing import NamedTuple


class Row(NamedTuple):
    """One adapted kernel."""

    path: str
    method: str
    shape: tuple[int, ...]
    trainable: int


class Summary(NamedTuple):
    """The adapted kernels and the counts of trainable and of base parameters."""

    rows: list[Row]
    trainable: int
    base: int

    @property
    def share(self) -> float:
        """Trainable parameters per base parameter."""
        return self.trainable / self.base

    def __str__(self) -> str:
        table = [("kernel", "method", "shape", "trainable")]
        table += [(row.path, row.method, str(row.shape), f"{row.trainable:,}") for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            f"{path:{widths[0]}}  {method:{widths[1]}}  {shape:{widths[2]}}  {count:>{widths[3]}}"
            for path, method, shape, count in table
        ]
        total = f"{self.trainable:,} trainable of {self.base:,} base parameters: {self.share:.4%}"
        return "\n".join([*(line.rstrip() for line in lines), total])
