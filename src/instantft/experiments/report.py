"""The report: sections as Markdown, as one HTML file with its pictures inside, and as JSON.

This file writes what it is given; it knows no target.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, files
from .core import Section, Table, machine

__all__ = ["Entry", "as_html", "as_json", "as_markdown", "write_report"]


@dataclass(frozen=True)
class Entry:
    """A section and what it is about."""

    name: str
    title: str
    source: str
    command: str
    section: Section


def write_report(out: Path, entries: Sequence[Entry], *, quick: bool, left: Mapping[str, str]) -> list[Path]:
    """Write report.md, report.html, report.json and the pictures to a directory.

    Args:
        out: the directory, made if it is not there.
        entries: in their order.
        quick: whether to warn that little was run.
        left: what is not there yet, name to words.

    Returns:
        The files.

    Raises:
        FileError: they cannot be written.
    """
    written: list[Path] = []

    def write(name: str, data: bytes) -> None:
        files.write_whole(out / name, data, "the report")
        written.append(out / name)

    for entry in entries:
        for picture in entry.section.pictures:
            write(f"{picture.name}.png", picture.png)
    write("report.json", as_json(entries).encode())
    write("report.md", as_markdown(entries, quick=quick, left=left).encode())
    write("report.html", as_html(entries, quick=quick, left=left).encode())
    return written


def as_json(entries: Sequence[Entry]) -> str:
    """{target: {paper, ours, unit, trials, command, note}}."""
    found: dict[str, Any] = {
        e.name: {
            "paper": e.section.paper,
            "ours": e.section.ours,
            "unit": e.section.unit,
            "trials": e.section.trials,
            "command": e.command,
            "note": e.section.note,
        }
        for e in entries
    }
    return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _head(quick: bool) -> list[str]:
    here = machine()
    lines = [
        (
            "Every table and figure of Skip2-LoRA (ASP-DAC 2025), its poster on CNNs, and InstantFT (2025), beside"
            f" what instantft {__version__} measures."
        ),
        (
            f"Measured on: {here['cpu']}, {here['cpus']} processors, {here['system']}, Python {here['python']}, "
            f"NumPy {here['numpy']}."
        ),
        "“not in our copy” marks numbers that the papers show in pictures or in tables that our copies lack.",
    ]
    if quick:
        lines.append(
            "QUICK RUN: fewer trials, epochs and samples than the papers have, to see that everything works. Do not"
            " quote these numbers."
        )
    return lines


def _trials(n: int) -> str:
    return "counted, not run" if n == 0 else f"{n} trial{'s' * (n > 1)} behind a number"


def as_markdown(entries: Sequence[Entry], *, quick: bool, left: Mapping[str, str]) -> str:
    """The report in Markdown; pictures are files beside it."""
    lines = ["# The papers, made again", ""]
    for text in _head(quick):
        lines += [text, ""]
    lines += [f"- [{e.name}](#{e.name}): {e.title}" for e in entries]
    lines += [f"- {name}: {words}" for name, words in left.items()]
    for e in entries:
        lines += [
            "",
            f"## {e.name}",
            "",
            f"**{e.title}**. {e.source}. Unit: {e.section.unit}. {_trials(e.section.trials)}.",
        ]
        for table in e.section.tables:
            lines += ["", *([table.caption, ""] if table.caption else []), *_markdown_table(table)]
        for picture in e.section.pictures:
            lines += ["", f"![{picture.alt}]({picture.name}.png)"]
        lines += ["", e.section.note.strip(), "", f"Made by `{e.command}`."]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [row(table.head), "|---" + "|--:" * (len(table.head) - 1) + "|", *map(row, table.rows)]


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.8rem}h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-size:.88rem}
caption{text-align:left;color:#555;padding-bottom:.3rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid #e5e5e5;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f6f6f6;white-space:normal}
img{max-width:100%;height:auto}code{background:#f3f3f3;padding:.1rem .3rem}
.warning{background:#fff3cd;padding:.5rem 1rem}.about{color:#555}
"""


def as_html(entries: Sequence[Entry], *, quick: bool, left: Mapping[str, str]) -> str:
    """The report as one file: no script, nothing fetched, pictures inside."""
    text = html.escape
    parts = [
        (
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width,initial-scale=1'>"
            f"<title>The papers, made again</title><style>{STYLE}</style></head><body>"
        ),
        "<h1>The papers, made again</h1>",
    ]
    parts += [f"<p{' class=warning' if line.startswith('QUICK') else ''}>{text(line)}</p>" for line in _head(quick)]
    parts.append("<ul>")
    parts += [f"<li><a href='#{e.name}'>{e.name}</a>: {text(e.title)}</li>" for e in entries]
    parts += [f"<li>{text(name)}: {text(words)}</li>" for name, words in left.items()]
    parts.append("</ul>")
    for e in entries:
        s = e.section
        parts.append(f"<h2 id='{e.name}'>{e.name}: {text(e.title)}</h2>")
        parts.append(f"<p class=about>{text(e.source)}. Unit: {text(s.unit)}. {_trials(s.trials)}.</p>")
        parts += [_html_table(table) for table in s.tables]
        for picture in s.pictures:
            data = base64.b64encode(picture.png).decode()
            parts.append(f"<p><img alt='{text(picture.alt, quote=True)}' src='data:image/png;base64,{data}'></p>")
        parts.append(f"<p>{text(s.note.strip())}</p><p class=about>Made by <code>{text(e.command)}</code>.</p>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    body = "".join(row(r, "td") for r in table.rows)
    return (
        f"<div class=scroll><table>{caption}<thead>{row(table.head, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )
