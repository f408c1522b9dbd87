"""Pictures of a report for the documentation: desktop and phone, light and dark, as WebP.

    python tools/report_pictures.py runs/demo/report.html docs/img

Takes Chromium (or Chrome) from the path.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

# Width and height in CSS pixels, device pixels to each. Side by side at 72 % and 25 % of a page's
# width the two are equally high.
SCREENS = {"report": (1280, 1040, 1), "report-phone": (390, 913, 2)}
SCHEMES = {"dark": 0, "light": 1}  # of Blink's preferredColorScheme


def take(
    browser: str, page: Path, picture: Path, screen: tuple[int, int, int], scheme: int
) -> None:
    """Write the top of a page as its reader sees it."""
    width, height, scale = screen
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"),
            *(f"--force-device-scale-factor={scale}", f"--screenshot={shot}"),
            f"--blink-settings=preferredColorScheme={scheme}",
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").save(picture, quality=82, method=6)


def main() -> None:
    page, out = (Path(argument) for argument in sys.argv[1:])
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium and no google-chrome on the path")
    for name, screen in SCREENS.items():
        for scheme, number in SCHEMES.items():
            picture = out / f"{name}-{scheme}.webp"
            take(browser, page, picture, screen, number)
            print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
