"""The method and the step protocol. Knows no engine and renders nothing."""
