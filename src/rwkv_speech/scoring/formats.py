"""How figures and tables are written, in the terminal and in the report."""

import math
from collections.abc import Container, Mapping, Sequence
from html import escape
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from rwkv_speech.files import printable

ABSENT = "–"


def number(value: float, percent: bool = True, digits: int = 2) -> str:
    """A value without a sign of its unit; in percent, 0.0813 -> `8.13`."""
    return ABSENT if math.isnan(value) else f"{100 * value if percent else value:.{digits}f}"


def interval_text(interval: tuple[float, float], percent: bool = True, digits: int = 2) -> str:
    """An interval; in percent, (0.0741, 0.0892) -> `7.41–8.92`."""
    return ABSENT if math.isnan(interval[0]) else "–".join(number(bound, percent, digits) for bound in interval)


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it: 5.4 h, 12.0 min, 3.2 s."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def memory(size: int | None) -> str:
    """Bytes in GiB."""
    return ABSENT if size is None else f"{size / 2**30:.2f} GiB"


def figure(value: float | None) -> str:
    """A number to three significant digits."""
    return ABSENT if value is None else f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """`1 word`, `2 words`, `1,200 words`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# Tables hold one or more lines under each name: {name: [{column: text}]}. A column that begins with `<` is aligned
# to the left, one that begins with `*` stands out.
Rows = Mapping[str, Sequence[Mapping[str, str]]]


def terminal_table(rows: Rows, without: Container[str] = ()) -> Table:
    """A table for the terminal, a column for the split first."""
    table = Table("Split", box=None, padding=(0, 1), show_edge=False)
    table.columns[0].overflow = "fold"
    columns = [column for column in _columns(rows) if column not in without]
    for column in columns:
        table.add_column(column.lstrip("<*"), justify="left" if column[0] == "<" else "right", no_wrap=True)
    for name, lines in rows.items():
        for head, line in zip_longest((name,), lines, fillvalue=""):
            figures = (Text(printable(_figure(line, c)), style="bold" if c[0] == "*" else "") for c in columns)
            table.add_row(Text(printable(head), style="bold"), *figures)
    return table


def html_table(caption: str, rows: Rows, *, first: str = "Split", ruled: bool = True) -> str:
    """A table for the report, which scrolls sideways where it must.

    first: head of the column of names.
    ruled: a line between one name and the next.
    """
    kinds = {column: {"<": "text", "*": "main"}.get(column[0], "") for column in _columns(rows)}
    heads = "".join(_cell("th", kinds.get(c, "text"), c.lstrip("<*"), ' scope="col"') for c in (first, *kinds))
    body = ""
    for name, lines in rows.items():
        scope = f' scope="rowgroup" rowspan="{len(lines)}"' if len(lines) > 1 else ' scope="row"'
        for index, line in enumerate(lines):
            cells = "" if index else _cell("th", "text", name, scope)
            cells += "".join(_cell("td", kind, _figure(line, column)) for column, kind in kinds.items())
            body += f"{'<tr class=first>' if ruled and not index else '<tr>'}{cells}</tr>"
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _columns(rows: Rows) -> list[str]:
    """In the order of their first use; what stands out in one line stands out."""
    found = dict.fromkeys(column for lines in rows.values() for line in lines for column in line)
    starred = {column[1:] for column in found if column[0] == "*"}
    return list(dict.fromkeys(f"*{column}" if column in starred else column for column in found))


def _figure(line: Mapping[str, str], column: str) -> str:
    return line.get(column) or line.get(column.lstrip("*")) or ABSENT


def _cell(tag: str, kind: str, text: str, attributes: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f"<{tag}{attributes}{kind}>{escape(text)}</{tag}>"
