"What several test files share."
import shutil
import pytest

@pytest.fixture(scope="session")
def browser():
    "Headless Chromium; tests that need it are left out where there is none"
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None: pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'ultra_nb[dev]'").sync_playwright
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
    with sync() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()
