//! A display's device that is taken away while frames are shown on it: a vkms made by configfs (Linux 7.2), and removed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::{State, dmaflow, start};

pub const TESTS: &[Test] =
    &[Test { name: "gone::the_displays_device", needs: &["vivid", "vkms"], seconds: 120, run: the_displays_device }];

/// A card of vkms's with one output, besides the one that is always there. Taken away when dropped.
struct MadeCard {
    folder: PathBuf,
    node: PathBuf,
}

const FOLDERS: [&str; 4] = ["planes/plane", "crtcs/crtc", "encoders/encoder", "connectors/connector"];
const LINKS: [(&str, &str); 3] = [
    ("planes/plane/possible_crtcs/crtc", "crtcs/crtc"),
    ("encoders/encoder/possible_crtcs/crtc", "crtcs/crtc"),
    ("connectors/connector/possible_encoders/encoder", "encoders/encoder"),
];

impl MadeCard {
    fn new(folder: &Path) -> Result<MadeCard> {
        let before = nodes();
        fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut made = MadeCard { folder: folder.to_owned(), node: PathBuf::new() };
        for part in FOLDERS {
            fs::create_dir(folder.join(part)).context(part)?;
        }
        // A primary plane: DRM_PLANE_TYPE_PRIMARY.
        made.set("planes/plane/type", "1")?;
        for (link, to) in LINKS {
            symlink(folder.join(to), folder.join(link)).context(link)?;
        }
        made.set("enabled", "1")?;
        let new = nodes().into_iter().find(|node| !before.contains(node));
        made.node = new.context("no new card came")?;
        Ok(made)
    }

    fn set(&self, what: &str, value: &str) -> Result<()> {
        fs::write(self.folder.join(what), value).with_context(|| what.to_owned())
    }
}

impl Drop for MadeCard {
    fn drop(&mut self) {
        // What is not there need not be removed.
        let _ = self.set("enabled", "0");
        for (link, _) in LINKS {
            let _ = fs::remove_file(self.folder.join(link));
        }
        for part in FOLDERS {
            let _ = fs::remove_dir(self.folder.join(part));
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

fn nodes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev/dri").into_iter().flatten().flatten();
    let cards = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("card"));
    cards.map(|entry| entry.path()).collect()
}

fn the_displays_device() -> anyhow::Result<Outcome> {
    let configfs = Path::new("/sys/kernel/config/vkms");
    if !configfs.exists() {
        return Ok(Outcome::Skipped("vkms of this kernel makes no cards that can be taken away".to_owned()));
    }
    let before = State::read();
    let card = MadeCard::new(&configfs.join("gone"))?;
    let node = card.node.display().to_string();
    for path in ["auto", "zero-copy"] {
        card.set("connectors/connector/status", "1")?;
        card.set("enabled", "1")?;
        let mut running = start(&mut dmaflow(&format!(
            "pipe --from vivid --to {node} --format XR24 --size 640x360 --path {path} --json"
        )))?;
        running.wait_until("to hold frames", |_| !before.new_dma_bufs().is_empty())?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        ensure!(running.runs(), "it ended too soon");
        // DRM_MODE_DISCONNECTED, as when a dock with the display's adapter is pulled.
        card.set("connectors/connector/status", "2")?;
        card.set("enabled", "0")?;
        let run = running.end()?;
        let line = run.one_line(1, &[&node, "device is gone"])?;
        note(line);
        let start = format!("error: cannot show a frame on {node}: the display's device is gone");
        ensure!(line.starts_with(&start), "another cause comes first: {line}");
        ensure!(line.matches("cannot").count() == 1 && !line.contains("size"), "more than the cause: {line}");
        ensure!(line.len() < 160, "{} characters: {line}", line.len());
    }
    drop(card);
    before.is_back()?;
    PASSED
}
