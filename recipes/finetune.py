"""Fine-tune with Accelerate, on however many processes: what ``hf-glu finetune`` does, as a script to launch.

accelerate launch recipes/finetune.py --config bert-geglu-glue --task sst2 --output runs/sst2
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/finetune.py ...  # two CPU processes
accelerate launch --config_file "$(hf-glu configs fsdp2)" recipes/finetune.py ...
"""

import sys

from hf_glu.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
