"""Three hospitals train one model with dpjax over Flower."""
