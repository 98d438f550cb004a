"""Runs that only tell how good a learning rate is."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hf_glu.checkpoint.files import RESULTS_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.errors import DivergedError
from hf_glu.instruments.routing import active_parameters
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.loop import checkpoints
from hf_glu.training.results import Results


class TrialRun(LanguageRun):
    """A run whose results are kept, and whose model isn't. That it diverges is one, too."""

    def run(self) -> Results:
        """Train and evaluate; return results without a loss where training diverges."""
        try:
            return super().run()
        except DivergedError:
            counts = {"parameters": self.model.num_parameters(), "active_parameters": active_parameters(self.model)}
            known = cast(Results, {"task": self.entry["task"], "main": ["loss"], "metrics": {}, **counts})
            if self.folder is not None:
                self.finish(self.folder, known)
            return known

    def finish(self, folder: Path, results: Results) -> None:
        """Write the results."""
        if self.main:
            write_json(folder / RESULTS_FILE, results)
            self.close(folder, results)

    def close(self, folder: Path, results: Results) -> None:
        """Remove what only an unfinished run needs."""
        checkpoints.remove_all(folder)
