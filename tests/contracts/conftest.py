import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """Nearly all the time of this suite goes into compiling; the laws hold however well the compiler optimizes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
