"""From and to experts: upcycling, splitting, native banks, ungating."""
