//! Buffers that a GPU made, by Vulkan: for a camera to fill, for a display to show, and for the GPU itself to write.

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{ImportCache, Rung, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::format::{Layout, Modifier};
use dmaflow::frame::{Buffer, Room};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{Gpu, GpuBuffer, GpuImporter, GpuRequest};

use crate::camera::{format, open};
use crate::gpu::{comes_to_a_level, silent, watched};
use crate::harness::{Outcome, PASSED, Test};
use crate::process::{State, finish, number};
use crate::vulkan::{MANY, pipe};

const NEEDS: &[&str] = &["vivid", "udmabuf", "vulkaninfo"];
const DISPLAY: &[&str] = &["vivid", "vkms", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "gpu_made::what_it_makes", needs: NEEDS, seconds: 120, run: what_it_makes },
    Test { name: "gpu_made::what_it_refuses", needs: NEEDS, seconds: 120, run: what_it_refuses },
    Test { name: "gpu_made::filled_by_the_camera", needs: NEEDS, seconds: 240, run: filled_by_the_camera },
    Test { name: "gpu_made::shown_by_the_display", needs: DISPLAY, seconds: 240, run: shown_by_the_display },
    Test { name: "gpu_made::a_thousand", needs: NEEDS, seconds: 240, run: a_thousand },
];

const SAMPLED: vk::ImageUsageFlags = vk::ImageUsageFlags::SAMPLED;
const STORAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::STORAGE_BUFFER;

fn layout(name: &str, size: (u32, u32)) -> Result<Layout> {
    Ok(Layout::packed(format(name), size, 1)?)
}

/// What is written into it is there for others: for whoever maps it, and for the GPU that imports it anew.
fn keeps_what_is_written(gpu: &Gpu, buffer: &Buffer) -> Result<()> {
    let layout = *buffer.layout();
    let row = |plane: usize, y: u32| -> Vec<u8> {
        let bytes = layout.format().row_bytes(plane, layout.width());
        (0..bytes).map(|x| (x * 7 + y * 31 + plane as u32 * 101) as u8).collect()
    };
    let rows = || {
        (0..layout.format().planes())
            .flat_map(|plane| (0..layout.format().rows(plane, layout.height())).map(move |y| (plane, y)))
    };
    let mut writer = buffer.write()?;
    rows().for_each(|(plane, y)| writer.row(plane, y, &row(plane, y)));
    writer.end()?;
    let importer = GpuImporter::new(gpu.clone(), SAMPLED);
    ensure!(importer.import_planes(buffer)?.len() == layout.format().planes(), "{layout}");
    let bytes = GpuBuffer::import(gpu, buffer, 0, STORAGE)?;
    ensure!(bytes.len() >= layout.memory_len(0) as u64, "{layout}");
    // Another mapping of the same memory than the one that was written through.
    let other = buffer.with_layout(layout.with_modifier(None))?;
    let reader = other.read()?;
    for (plane, y) in rows() {
        let expected = row(plane, y);
        let mut found = vec![0; expected.len()];
        reader.row(plane, y, &mut found);
        ensure!(found == expected, "{layout}: plane {plane} row {y}");
    }
    Ok(())
}

fn what_it_makes() -> anyhow::Result<Outcome> {
    let before = State::read();
    let gpu = watched()?;
    let other = watched()?;
    for (name, size) in [("XR24", (66, 34)), ("AR24", (64, 48)), ("GREY", (33, 5)), ("RG16", (70, 20))] {
        let buffer = gpu.make_buffer(&layout(name, size)?, &Room::default(), SAMPLED, &[Modifier::LINEAR])?;
        let made = *buffer.layout();
        ensure!(made.modifier() == Some(Modifier::LINEAR) && made.format() == format(name), "{made}");
        ensure!(made.size() == size && buffer.is_dma_buf() && buffer.memory().len() == 1, "{made}");
        keeps_what_is_written(&other, &buffer).with_context(|| name.to_owned())?;
        // With no tiling asked for it states which it chose.
        let any = gpu.make_buffer(&layout(name, size)?, &Room::default(), SAMPLED, &[])?;
        ensure!(any.layout().modifier().is_some(), "{}", any.layout());
    }
    for (name, size) in [("YUYV", (66, 34)), ("NV12", (66, 34)), ("YU12", (62, 18)), ("BA81", (64, 32))] {
        let buffer = gpu.make_bytes(&Layout::packed(format(name), size, 64)?, &Room::default(), STORAGE)?;
        ensure!(buffer.layout().modifier() == Some(Modifier::LINEAR), "{}", buffer.layout());
        if name != "YUYV" {
            keeps_what_is_written(&other, &buffer).with_context(|| name.to_owned())?;
        }
    }
    // Memory planes apart, and room behind the rows.
    let apart = Layout::separate(format("NV12"), (64, 32), &[128, 192])?;
    let room = Room::for_lens(&[70_000, 50_000]);
    let buffer = gpu.make_bytes(&apart, &room, STORAGE)?;
    ensure!(buffer.memory().len() == 2 && buffer.memory_lens()[0] >= 70_000, "{:?}", buffer.memory_lens());
    ensure!(buffer.memory_lens()[1] >= 50_000, "{:?}", buffer.memory_lens());
    let room = Room::for_lens(&[100_000]);
    let roomy = gpu.make_buffer(&layout("XR24", (64, 48))?, &room, SAMPLED, &[Modifier::LINEAR])?;
    ensure!(roomy.memory_lens()[0] >= 100_000, "{:?}", roomy.memory_lens());
    // It outlives the GPU that made it.
    silent(gpu)?;
    keeps_what_is_written(&other, &roomy)?;
    drop((buffer, roomy));
    silent(other)?;
    before.is_back()?;
    PASSED
}

fn what_it_refuses() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    // I915_FORMAT_MOD_X_TILED, which no software driver has; a format whose planes Vulkan does not read as they lie; a sample that stands
    // for pixels that are not there; more than an image may be.
    let tiled = Modifier::from_drm((1 << 56) | 1).context("a modifier")?;
    for (name, size, modifier, word) in [
        ("XR24", (64, 48), tiled, "0x0100000000000001"),
        ("YUYV", (64, 48), Modifier::LINEAR, "no such format"),
        ("NV12", (63, 47), Modifier::LINEAR, "chroma"),
        ("GREY", (1 << 20, 1), Modifier::LINEAR, "exports no such image"),
    ] {
        let error = gpu
            .make_buffer(&layout(name, size)?, &Room::default(), SAMPLED, &[modifier])
            .err();
        let error = error.with_context(|| format!("{name} was made"))?;
        ensure!(error.kind() == Kind::Unsupported && error.line().contains(word), "{}", error.line());
        ensure!(error.known_repair().is_some(), "{}", error.line());
    }
    let rows = layout("XR24", (64, 48))?.with_modifier(Some(tiled));
    let error = gpu.make_bytes(&rows, &Room::default(), STORAGE).err().context("tiled rows")?;
    ensure!(error.kind() == Kind::Invalid && error.line().contains("tiled"), "{}", error.line());
    silent(gpu)?;
    PASSED
}

/// The rung `reverse`: the camera captures into the GPU's memory, which reads it there.
fn filled_by_the_camera() -> anyhow::Result<Outcome> {
    let before = State::read();
    for name in ["XR24", "NV12", "YU12", "RG16"] {
        let options = format!("{MANY} --format {name} --memory sink --frames 20 --verify");
        let result = finish(&mut pipe(&options))?.json(0).with_context(|| name.to_owned())?;
        ensure!(result["path"] == "reverse" && number(&result, "bytes_copied")? == 0, "{name}: {result}");
        ensure!(number(&result, "imports")? == number(&result, "buffers")?, "{name}: {result}");
        ensure!(number(&result, "verify/checked")? == 20 && number(&result, "verify/wrong")? == 0, "{name}: {result}");
        before.is_back()?;
    }
    PASSED
}

/// A camera fills the GPU's memory, and a display shows it.
fn shown_by_the_display() -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 20;
    let before = State::read();
    let gpu = watched()?;
    let mut camera = open("XR24", (640, 360))?;
    let wished = *gpu
        .make_buffer(camera.layout(), &Room::default(), SAMPLED, &[Modifier::LINEAR])?
        .layout();
    let (agreed, room) = camera.agree(&wished)?;
    let made = (0..4).map(|_| gpu.make_buffer(&agreed, &room, SAMPLED, &[Modifier::LINEAR]));
    camera.use_buffers(made.collect::<Result<_, _>>()?)?;
    // The GPU has them too, all the while.
    let (mut cache, mut importer) = (ImportCache::new(), GpuImporter::new(gpu.clone(), SAMPLED));
    for buffer in camera.buffers() {
        cache.get(&mut importer, buffer)?;
    }
    let mut display = Display::find("vkms", DisplayRequest { verify: true, ..DisplayRequest::default() })?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let pipe = Pipe::join(&mut camera, &mut display, Path::ZeroCopy, limits)?;
    ensure!(pipe.rung() == Rung::Exported, "{}: {:?}", pipe.rung(), pipe.refusals());
    let account = pipe.run(None, &mut |_| {})?;
    ensure!(account.captured == FRAMES && account.copies.bytes() == 0, "{} captured", account.captured);
    let verdict = display.verdict().context("no verdict")?;
    ensure!(verdict.checked == FRAMES && verdict.wrong == 0, "{verdict:?}");
    display.restore()?;
    drop((display, cache, importer, camera));
    silent(gpu)?;
    before.is_back()?;
    PASSED
}

fn a_thousand() -> anyhow::Result<Outcome> {
    let gpu = Gpu::open(&GpuRequest::default())?;
    let (image, bytes) = (layout("XR24", (320, 180))?, layout("NV12", (320, 180))?);
    comes_to_a_level("made", &mut || {
        gpu.make_buffer(&image, &Room::default(), SAMPLED, &[Modifier::LINEAR])?;
        gpu.make_bytes(&bytes, &Room::default(), STORAGE)?;
        Ok(())
    })?;
    PASSED
}
