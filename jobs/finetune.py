"""Next-token classification: measure -> start layers -> plan -> train -> scores.

python jobs/finetune.py --config jobs/configs/finetune_antsynnet.yaml
ray job submit --working-dir . -- python jobs/finetune.py --config CONFIG --set storage_path=/shared/runs
"""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
