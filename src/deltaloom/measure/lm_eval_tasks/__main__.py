"""Print the folder for `lm-eval --include_path`."""

from deltaloom.measure.lm_eval_tasks import FOLDER

print(FOLDER)
