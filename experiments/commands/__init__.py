"""The subcommands of ``manyheads``, a module each: ``run(argv: list[str]) -> int`` returns the exit code."""
