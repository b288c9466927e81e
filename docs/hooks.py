"""What mkdocs needs to know of this repository.

1. Pages link as they lie in the repository (``../benchmarks/results/step.md``), where people read them too.
2. The files OUTSIDE of docs/ are on the site under their path in the repository, those of docs/ under their path there.
3. So each link is followed in the repository, and written anew for the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*.md", "examples/*.py")
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The files outside of docs/ join those inside."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository as links of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here if page.file.generated_by else f"docs/{here}")

    def anew(link: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(folder, link[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return _LINK.sub(anew, markdown)
