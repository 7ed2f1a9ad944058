"""Hook of MkDocs: the site has the files of the repository under their own paths.

So a link between two Markdown files is right here and wherever the repository is read, and the README is the first page.
Other files that pages may link to travel along as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FILES = (
    "README.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/*.md",
    "docs/images/*",
    "benchmarks/**/*.md",
    "benchmarks/best.json",
    "examples/*.py",
    "patches/README.md",
)


def on_files(files: Files, config: Any) -> Files:
    """Puts the files of the repository in the place of those of `docs`.

    Args:
        files: What MkDocs found: the folder of documents and the theme.
        config: MkDocs' configuration.

    Returns:
        The files of the site.
    """
    root = Path(config.config_file_path).parent
    documents = Path(config.docs_dir)
    for file in list(files):
        if file.abs_src_path and documents in Path(file.abs_src_path).parents:
            files.remove(file)
    for pattern in FILES:
        for path in sorted(root.glob(pattern)):
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
