"""Making a drafter: data that the target wrote, training, export.

It knows nothing of vLLM; who answers prompts is handed in by the command line.
"""
