"""CTranslate2: what it serves (runtime), how a folder is written (write, pack, patches), and the loaded model (loaded)."""
