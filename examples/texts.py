"""Write the first COUNT texts of a JSON Lines file as rows {id, text}. A row without `text` may have `context`.

python examples/texts.py TEXTS.jsonl -o OUT.jsonl [--count N]
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.text_files import read_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="JSON Lines file to read")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--count", type=int, default=44, help="number of texts (default: 44)")
    options = parser.parse_args()
    try:
        rows = [text_row(options.texts, *row) for row in itertools.islice(read_jsonl(options.texts), options.count)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, options.output)
    print(json.dumps({"texts": len(rows)}))


def text_row(path: Path, line: int, row: dict) -> dict[str, str]:
    text = row.get("text", row.get("context"))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"input {path}: line {line} has no text; rows must have `id` and `text` (or `context`)")
    return {"id": str(row.get("id", line)), "text": text}


if __name__ == "__main__":
    main()
