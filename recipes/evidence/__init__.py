"""What gates, experts, memory and modulation bring: studies with paired seeds. PROTOCOL.md says what is claimed."""
