"""Our tasks for lm-eval, which reads folders of YAML; `python -m` of this prints the folder.

lm-eval builds all requests before it generates, so there is no revision and no grader here: one
turn, exact checks. The two-turn form with a grader is the inspect_ai task.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What `--include_path` takes."""
