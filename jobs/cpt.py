"""The whole chain: config -> trace -> plan -> corpus -> train -> checkpoint -> evaluate -> verdict.

python jobs/cpt.py --config jobs/configs/quickstart.yaml
ray job submit --working-dir . -- python jobs/cpt.py --config jobs/configs/quickstart.yaml --set storage_path=/shared/runs
"""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
