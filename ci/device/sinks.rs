//! The other ends: the pattern into the display, frames into PNG files, frames into nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use drm::control::Device as _;

use crate::formats::{shown_of_captured, shown_without_a_copy};
use crate::harness::{Outcome, PASSED, Test};
use crate::modules::Witness;
use crate::process::{State, dmaflow, finish, number};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test {
        name: "sinks::pattern_to_the_display",
        needs: &["vkms", "udmabuf"],
        seconds: 240,
        run: pattern_to_the_display,
    },
    Test { name: "sinks::pattern_in_strange_sizes", needs: &["vkms", "udmabuf"], seconds: 120, run: strange_sizes },
    Test { name: "sinks::camera_to_png", needs: NEEDS, seconds: 120, run: camera_to_png },
    Test { name: "sinks::png_failures", needs: NEEDS, seconds: 60, run: png_failures },
    Test { name: "sinks::camera_to_null", needs: NEEDS, seconds: 60, run: camera_to_null },
    Test { name: "sinks::zero_copy_into_a_file", needs: NEEDS, seconds: 60, run: zero_copy_into_a_file },
];

/// Size and RGB bytes of a PNG file.
pub fn read_png(path: &Path) -> Result<((u32, u32), Vec<u8>)> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info()?;
    let mut bytes = vec![0; reader.output_buffer_size().context("a size")?];
    let info = reader.next_frame(&mut bytes)?;
    ensure!(info.color_type == png::ColorType::Rgb && info.bit_depth == png::BitDepth::Eight, "{info:?}");
    bytes.truncate(info.buffer_size());
    Ok(((info.width, info.height), bytes))
}

/// Whether a part of the picture (left, top, right, bottom in per cent) has as many colours as colour bars do.
pub fn has_bars(((width, height), rgb): &((u32, u32), Vec<u8>)) -> bool {
    let y = height * 55 / 100;
    let pixel = |x: u32| {
        let at = ((y * width + x) * 3) as usize;
        // Coarse: the same bar in YUV and RGB differs by a few steps.
        rgb[at..at + 3].iter().map(|&value| value >> 6).collect::<Vec<_>>()
    };
    (0..*width).map(pixel).collect::<BTreeSet<_>>().len() >= 6
}

struct Open(File);

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Open {}
impl drm::control::Device for Open {}

/// Sort and formats of every plane, asked without dmaflow.
pub fn plane_formats(card: &Path) -> Result<Vec<(String, Vec<u32>)>> {
    let card = Open(File::options().read(true).write(true).open(card)?);
    drm::Device::set_client_capability(&card, drm::ClientCapability::UniversalPlanes, true)?;
    let mut planes = Vec::new();
    for handle in card.plane_handles()? {
        let mut kind = "overlay";
        let properties = card.get_properties(handle)?;
        let (ids, values) = properties.as_props_and_values();
        for (id, value) in std::iter::zip(ids, values) {
            if card.get_property(*id)?.name().to_bytes() == b"type" {
                kind = ["overlay", "primary", "cursor"][usize::try_from(*value)?];
            }
        }
        planes.push((kind.to_owned(), card.get_plane(handle)?.formats().to_vec()));
    }
    Ok(planes)
}

/// The source that needs no camera, in every format that the display has.
fn pattern_to_the_display() -> anyhow::Result<Outcome> {
    let list = finish(&mut dmaflow("list --json"))?.json(0)?;
    let formats: Vec<_> = list["displays"][0]["formats"]
        .as_array()
        .context("formats")?
        .iter()
        .filter_map(|f| f.as_str())
        .collect();
    ensure!(formats.len() >= 3, "{formats:?}");
    let witness = Witness::new()?;
    let before = State::read();
    for format in formats {
        let options =
            format!("pipe --from pattern --to vkms --format {format} --size 320x180 --frames 3 --verify --json");
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| format.to_owned())?;
        shown_without_a_copy(&result, 3).with_context(|| format.to_owned())?;
        ensure!(result["source"] == "pattern", "{result}");
        before.is_back()?;
    }
    for present in ["fifo", "mailbox"] {
        let options = format!(
            "pipe --from pattern --to vkms --format XR24 --frames 10 --fps 20 --present {present} --verify --json"
        );
        let result = finish(&mut dmaflow(&options))?.json(0)?;
        // In mailbox mode a newer frame may take the place of one that waits, when emulation is slow: it is counted, and no more.
        let replaced = number(&result, "frames/dropped_by_display")?;
        ensure!(present == "mailbox" || replaced == 0, "{result}");
        ensure!(replaced < 5, "{result}");
        shown_of_captured(&result, 10 - replaced, 10)?;
    }
    drop(witness);
    PASSED
}

fn strange_sizes() -> anyhow::Result<Outcome> {
    for size in ["64x48", "65x49", "641x361", "67x1080", "1279x50"] {
        let options = format!("pipe --from pattern --to vkms --format XR24 --size {size} --frames 2 --verify --json");
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| size.to_owned())?;
        shown_without_a_copy(&result, 2).with_context(|| size.to_owned())?;
    }
    PASSED
}

fn camera_to_png() -> anyhow::Result<Outcome> {
    let file = Path::new("/tmp/camera.png");
    for format in ["XR24", "RG16", "NV12", "YU12", "YUYV", "NV16"] {
        let _ = fs::remove_file(file);
        let options =
            format!("pipe --from vivid --to png:{} --format {format} --size 640x360 --frames 3 --json", file.display());
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| format.to_owned())?;
        ensure!(result["path"] == "copied", "{result}");
        // One frame was read and not three: three were taken, the newest written.
        ensure!(number(&result, "frames/presented")? == 3, "{result}");
        let copies = result["copies"].as_array().context("copies")?;
        ensure!(copies.len() == 1 && copies[0]["count"] == 1, "{result}");
        let bytes = number(&result, "bytes_copied")?;
        let wanted = match format {
            "XR24" => 640 * 360 * 4,
            "NV12" | "YU12" => 640 * 360 * 3 / 2,
            _ => 640 * 360 * 2,
        };
        ensure!(bytes == wanted, "{format}: {bytes} bytes copied, {wanted} are the pixels");
        let picture = read_png(file)?;
        ensure!(picture.0 == (640, 360) && has_bars(&picture), "{format}: no colour bars in {}", file.display());
    }
    fs::remove_file(file)?;
    PASSED
}

fn png_failures() -> anyhow::Result<Outcome> {
    let before = State::read();
    for (file, words) in
        [("/tmp/no/such/folder.png", "/tmp/no/such/folder.png"), ("/tmp", "/tmp"), ("/dev/null", "/dev/null")]
    {
        let run = finish(&mut dmaflow(&format!("pipe --from vivid --to png:{file} --frames 2 --json")))?;
        run.one_line(1, &[words])?;
        before.is_back()?;
    }
    finish(&mut dmaflow("pipe --from vivid --to png: --frames 2"))?.has_status(2)?;
    ensure!(fs::metadata("/dev/null")?.len() == 0, "/dev/null was replaced");
    PASSED
}

fn camera_to_null() -> anyhow::Result<Outcome> {
    let result =
        finish(&mut dmaflow("pipe --from vivid --to null --fps 60 --format NV12 --frames 30 --json"))?.json(0)?;
    ensure!(number(&result, "frames/presented")? == 30 && number(&result, "bytes_copied")? == 0, "{result}");
    ensure!(
        result.get("verify").is_none() && result.get("mode").is_none(),
        "what was not measured is printed: {result}"
    );
    let result = finish(&mut dmaflow("pipe --from vivid --to null --fps 60 --seconds 1 --json"))?.json(0)?;
    let (seconds, captured) = (result["seconds"].as_f64().context("seconds")?, number(&result, "frames/captured")?);
    ensure!((0.9..2.0).contains(&seconds) && captured > 5, "{result}");
    PASSED
}

fn zero_copy_into_a_file() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("pipe --from vivid --to png:/tmp/never.png --frames 2 --path zero-copy --json"))?;
    run.one_line(3, &["zero copy"])?;
    let result = run.json(3)?;
    ensure!(result["refusals"][0]["rung"] == "exported", "{result}");
    ensure!(!Path::new("/tmp/never.png").exists(), "a copy in spite of the demand");
    PASSED
}
