"""What benchmarks leave."""

import csv
from collections.abc import Iterable, Sequence


def write_csv(path: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
