"""What each command of the front door asks for and calls. Work is in `layerplan.pipeline`, imported when it is needed."""
