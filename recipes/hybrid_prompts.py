"""Write the hybrid demo's prompts: of the kind that the tiny hybrid was trained on, fresh ones.

python recipes/hybrid_prompts.py OUT.jsonl [COUNT]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.tiny_hybrid.prompts import prompts

# Its training text came from seed 1; another seed draws other prompts from the same word lists.
SEED = 7


def main() -> None:
    out = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1500
    out.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": prompt} for prompt in dict.fromkeys(prompts(count, seed=SEED))]
    out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{len(records)} prompts in {out}")


if __name__ == "__main__":
    main()
