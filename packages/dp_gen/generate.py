"""Generate persons with a trained editor, from this folder.

python generate.py --finetuned_model_path {OUTPUT_PATH} --out new \\
  --test_description "a woman with gold hair<|image|> and a white skirt<|image|>" \\
  --test_reference_attribute_folder references/

python generate.py --finetuned_model_path {OUTPUT_PATH} --out edits \\
  --edit_folder {DATASET_PATH} --reference_pool products/

All flags: python generate.py --help
"""

import sys

from dp_gen.cli import generate_main

if __name__ == "__main__":
    sys.exit(generate_main())
