"What several test files share."
import shutil
import pytest

BROWSER = {"test_docs", "test_explorer", "test_pages", "test_report"} # one browser at a time

def pytest_collection_modifyitems(items):
    "With two workers (make test): tests of a file share its fixtures and stay together; notebooks are shared out"
    for item in items:
        group = "browser" if item.path.stem in BROWSER else item.path.stem
        if group != "test_project": item.add_marker(pytest.mark.xdist_group(group))

@pytest.fixture(scope="session")
def browser():
    "Headless Chromium; tests that need it are left out where there is none"
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None: pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'ultra_nb[dev]'")
    flags = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync""".split()
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()
