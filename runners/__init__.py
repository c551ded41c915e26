"""From a config to a record: train one run, tune a method, reproduce a comparison."""
