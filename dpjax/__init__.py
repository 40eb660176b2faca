"""dpjax."""
