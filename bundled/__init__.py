"""The model that travels with the repository: a tiny Qwen3, and the scripts that made it.

Importing this package only names the model's folder; it imports neither torch nor transformers.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "tiny-qwen3"
