"""The project's names on GitHub and the Hugging Face Hub.

No other file spells them out, except the notebooks' Colab badges.
"""

GITHUB = "berkruveyik/vlm-foodVision-fine-tuning"  # the owner's name on GitHub differs from the one on the Hub
CODE = f"https://github.com/{GITHUB}"
OWNER = "berkeruveyik"  # on the Hub
REPOSITORY = "FoodExtract-Vision"
HUB_BASE = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
HUB_DATASET = f"{OWNER}/vlm-food-4k-not-food-dataset"  # the seed project's
HUB_MODEL = f"{OWNER}/{REPOSITORY}-SmolVLM2-500M"
HUB_PUBLISHED_DATASET = f"{OWNER}/{REPOSITORY}-dataset"  # what notebook 00 makes
HUB_SPACE = f"{OWNER}/{REPOSITORY}"
