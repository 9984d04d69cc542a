"""What the commands work on: a few pairs in files."""

import json

PAIRS = [{"prompt": f"Bad {i}?", "response": f"No {i}."} for i in range(6)]
BENIGN = [{"prompt": f"Good {i}?", "response": f"Yes, like this: {i}."} for i in range(6)]
SMALL = ["--harmful", "harmful.jsonl", "--benign", "benign.jsonl"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
