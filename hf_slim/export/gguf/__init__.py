"""GGUF, the file of llama.cpp, Ollama and LM Studio."""
