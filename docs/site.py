"""Build the pages as a site in build/site: make docs.

MkDocs takes pages from one folder only, and ours link to results, examples and code beside it. So
what git knows of them is copied to build/pages as it lies here, and every link stays right.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["*.md", "LICENSE", "docs", "examples", "benchmarks", "configs", "genmodels", "kernels"]
COPIED += ["tests/*.py", "tests/evaluation", "mkdocs.yml", ".github"]
COPIED += ["pretrained/*.md", "pretrained/*.png"]


def main() -> int:
    """Return the exit code of mkdocs."""
    pages = ROOT / "build/pages"
    shutil.rmtree(pages, ignore_errors=True)
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", *COPIED], cwd=ROOT, check=True, capture_output=True
    )
    for name in listing.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (pages / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pages / name)
    words = ["build", "--quiet", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    return subprocess.run([sys.executable, "-m", "mkdocs", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
