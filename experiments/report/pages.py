"""The report of a directory, from the files of its runs only: a page, its text, its numbers, a picture."""

from __future__ import annotations

import os
from pathlib import Path

from ess_rl.errors import UsageError
from experiments.report import data, html, picture, text


def write(root: Path, out: Path | None = None) -> str:
    """Write the report of all runs below `root`. -> text to print: counts and the files

    Args:
        out: the page, default `root`/report.html; report.md and report.png are named after it, scores.csv lies next to
            it. There is no picture if no two methods, or tasks, can be grouped.

    Raises:
        UsageError: `root` holds no run, `out` is not an .html file, or a file not written by a report is in the way.
    """
    out = out or root / "report.html"
    if out.suffix != ".html":
        raise UsageError(f"--out {out}: name a file that ends in .html")
    report = data.build(root)
    pages = {
        out: html.page(report),
        out.with_suffix(".md"): text.markdown(report),
        out.with_name("scores.csv"): text.scores_csv(report),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    image = out.with_suffix(".png")
    for path in (*pages, image):
        mark = pages[path].splitlines()[0] if path.suffix == ".csv" else picture.MARK
        if path.exists() and mark.encode() not in path.read_bytes():
            raise UsageError(f"{path} was not written by 'ess-rl report': move it away, or choose another --out")
    for path, content in pages.items():
        part = path.with_name(path.name + ".part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    files = list(pages)
    if picture.write(report, image):
        files.append(image)
    return "\n".join([text.overview(report), *map(str, files)])
