"""RL of language models in JAX: pure functions, and one page for each paper.

Importing this package imports nothing else; take what you need: `from jaxrl_llm import ops`.
"""

__version__ = "0.1.0"
