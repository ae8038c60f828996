"""The notebooks of `examples/`: executed, and their outputs written anew by this command.

python tests/support/notebooks.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[2] / "examples"


def execute_notebook(file: Path) -> NotebookNode:
    """Return a notebook with the outputs that its code has now, and nothing of when it ran."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()

    # the version of Python that ran it
    notebook.metadata.pop("language_info", None)
    return notebook


def collect_texts(notebook: NotebookNode) -> list[str]:
    """Return what the cells printed, warnings too, without pictures."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                texts.append(f"{output.name}: {output.text}")
    return texts


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        nbformat.write(execute_notebook(path), path)
        print(path)
