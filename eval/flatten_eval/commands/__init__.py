"""One module per subcommand: add_arguments(parser), and run(arguments) -> Outcome, or None on helper processes."""
