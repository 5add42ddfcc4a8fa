"""The frame of the report: one HTML file with its style inside and nothing outside."""

from html import escape

# Colours: after Okabe and Ito (2008), whose hues stay apart in the common kinds of colour blindness; darkened
# or lightened per theme. Words keep the colour of ink on a tint, so that contrast never hangs on the hue, and
# every kind of error has a line of its own: wavy, struck through, double.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfb; --ink: #1d2023; --muted: #5d646b; --rule: #d9dcde; --shade: #f3f4f2;
  --sub: #d55e00; --del: #0072b2; --ins: #b3609a;
  --sub-tint: #fde5d4; --del-tint: #d9ebf7; --ins-tint: #f5e1ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --ink: #e7e9ea; --muted: #a0a8ae; --rule: #353b40; --shade: #1d2125;
    --sub: #ee8a3c; --del: #56b4e9; --ins: #d893bd;
    --sub-tint: #55300f; --del-tint: #123e59; --ins-tint: #522f45;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3.5rem 0 .2rem; padding-top: 1.2rem; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 52rem; }
a { color: inherit; text-underline-offset: .2em; }
.note, figcaption { color: var(--muted); font-size: .9rem; }
.lead strong { font-size: 1.15em; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .8rem 0 0; padding: 0;
  font-size: .9rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--del); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child { padding-left: 0; }
th[scope=row], th.text, td.text { text-align: left; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--muted); }
tbody th { font-weight: 600; }
tbody tr.first > * { border-top: 1px solid var(--rule); }
tbody:first-of-type tr.first:first-child > * { border-top: 0; }
td.main { font-weight: 600; }
figure { margin: 1rem 0 0; }
figure svg { display: block; width: 100%; max-width: 48rem; height: auto; }
figure svg text { font-family: inherit !important; }
details { margin: .8rem 0; }
summary { cursor: pointer; width: fit-content; }
ol.worst { list-style: none; margin: 0; padding: 0; }
ol.worst > li { border-top: 1px solid var(--rule); padding: .8rem 0 .9rem; break-inside: avoid; }
.aligned { display: flex; flex-wrap: wrap; gap: .3rem .1rem; margin-top: .35rem; line-height: 1.35; }
.pair { display: grid; grid-template-rows: auto auto; padding: .1rem .25rem; border-radius: .2rem;
  overflow-wrap: anywhere; }
.pair > .hyp { color: var(--muted); }
.sub, .del, .ins { text-align: center; }
.sub > .hyp, .del > .hyp, .ins > .hyp { color: var(--ink); }
.sub { background: var(--sub-tint); }
.del { background: var(--del-tint); }
.ins { background: var(--ins-tint); }
.sub > .hyp { text-decoration: underline wavy var(--sub) 1px; text-underline-offset: .2em; }
.del > .ref { text-decoration: line-through var(--del) 2px; }
.ins > .hyp { text-decoration: underline double var(--ins); text-underline-offset: .2em; }
.key { gap: .3rem 1.2rem; font-size: .9rem; color: var(--muted); margin: .6rem 0 .9rem; }
.key .pair { display: inline-grid; vertical-align: middle; margin-right: .35rem; color: var(--ink); }
.flag { border: 1px solid currentColor; border-radius: .2rem; padding: 0 .3rem; font-size: .8rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
dl { font-size: .9rem; max-width: 52rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--muted); }
@media print { main { max-width: none; } .wide { overflow: visible; } }
"""

# Forbids the page every request, so that it shows the same on any desk, with or without a network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is text, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(caption: str, columns: list[str], rows: list[str]) -> str:
    """A table that scrolls sideways where it must; a column whose name begins with `<` is left-aligned."""
    heads = "".join(
        f'<th scope="col" class="text">{escape(column[1:])}</th>'
        if column.startswith("<")
        else f'<th scope="col">{escape(column)}</th>'
        for column in columns
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cells(*values: str, kind: str = "") -> str:
    """Table cells holding text."""
    opening = f'<td class="{kind}">' if kind else "<td>"
    return "".join(f"{opening}{escape(value)}</td>" for value in values)
