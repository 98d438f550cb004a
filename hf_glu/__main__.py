"""``python -m hf_glu``: the command line, also for launchers: ``accelerate launch -m hf_glu finetune ...``."""

from hf_glu.cli import main

if __name__ == "__main__":  # processes that are spawned import this again
    main()
