"""Tasks as data: GLUE, SuperGLUE and the movie reviews; their inputs, their answers, the leaderboards' files."""

from hf_glu.tasks.table import SUITES, TASKS, Task, find_task

__all__ = ["SUITES", "TASKS", "Task", "find_task"]
