"""What a trained model does: `python -m videonsa_jax.analysis VERB ...`, one file per verb.

Each verb writes NAME.csv (the numbers drawn), NAME.png and NAME.json (their summary).
"""
