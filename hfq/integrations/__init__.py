"""The only code that knows Transformers, PEFT and the Hub."""
