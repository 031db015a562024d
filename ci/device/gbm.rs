//! GBM: what it imports and makes on vkms and on vgem (Mesa's software renderer), and what it refuses and why.

use std::ffi::c_void;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{ImportCache, Importer, Refusal, Rung, Sink};
use dmaflow::error::Kind;
use dmaflow::format::{Format, Layout, Modifier};
use dmaflow::frame::{Buffer, Room};
use dmaflow::gbm::{Device, Gbm, GbmImporter, Usage};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::ladder::{Maker, Path as Way};
use dmaflow::memory::Allocator;
use dmaflow::pipe::{Limits, Pipe};
use serde_json::Value;

use crate::camera::{format, open};
use crate::capture::picture;
use crate::growth::comes_to_a_level;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{Witness, card, vivid};
use crate::process::{State, dmaflow, finish, number};

const NEEDS: &[&str] = &["vivid", "vkms"];
const UDMABUF: &[&str] = &["vkms", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "gbm::frames_into_it", needs: NEEDS, seconds: 240, run: frames_into_it },
    Test { name: "gbm::every_format", needs: UDMABUF, seconds: 120, run: every_format },
    Test { name: "gbm::formats_of_the_camera", needs: NEEDS, seconds: 300, run: formats_of_the_camera },
    Test { name: "gbm::linear_is_not_unstated", needs: UDMABUF, seconds: 60, run: linear_is_not_unstated },
    Test { name: "gbm::what_it_makes", needs: UDMABUF, seconds: 60, run: what_it_makes },
    Test { name: "gbm::buffers_outlive_the_device", needs: UDMABUF, seconds: 60, run: buffers_outlive },
    Test { name: "gbm::our_own_mapping", needs: NEEDS, seconds: 60, run: our_own_mapping },
    Test { name: "gbm::its_buffers_on_the_display", needs: NEEDS, seconds: 400, run: its_buffers_on_the_display },
    Test { name: "gbm::memory_on_demand", needs: NEEDS, seconds: 240, run: memory_on_demand },
    Test { name: "gbm::refusals", needs: UDMABUF, seconds: 120, run: refusals },
    Test {
        name: "gbm::without_libgbm",
        needs: &["vivid", "vkms", "root", "unshare"],
        seconds: 120,
        run: without_libgbm,
    },
    Test { name: "gbm::rungs", needs: NEEDS, seconds: 400, run: rungs },
    Test { name: "gbm::listed", needs: NEEDS, seconds: 120, run: listed },
    Test { name: "gbm::a_thousand_imports", needs: UDMABUF, seconds: 600, run: a_thousand },
];

/// A buffer of the system's memory, with rows such as any device takes.
fn shared(name: &str, size: (u32, u32)) -> Result<Buffer> {
    let layout = Layout::packed(format(name), size, 256)?;
    Ok(Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?)
}

/// A frame reached the device without a copy, each buffer imported once.
fn imported(result: &Value, path: &str, frames: u64) -> Result<()> {
    ensure!(result["path"] == path, "the path is {}: {result}", result["path"]);
    for (what, expected) in [("frames/captured", frames), ("frames/presented", frames), ("bytes_copied", 0)] {
        ensure!(number(result, what)? == expected, "{what} is not {expected}: {result}");
    }
    let (imports, buffers) = (number(result, "imports")?, number(result, "buffers")?);
    ensure!(imports == buffers && buffers > 0, "{imports} imports of {buffers} buffers");
    ensure!(result["refusals"] == Value::Array(vec![]), "{result}");
    Ok(())
}

fn render_node() -> Result<String> {
    let nodes = fs::read_dir("/dev/dri")?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    nodes
        .into_iter()
        .find(|node| node.starts_with("renderD"))
        .context("vgem has no render node")
}

fn frames_into_it() -> anyhow::Result<Outcome> {
    let before = State::read();
    let card = card()?;
    for (name, driver) in [
        ("gbm:vkms".to_owned(), "vkms"),
        (format!("gbm:{}", card.display()), "vkms"),
        ("gbm:vgem".to_owned(), "vgem"),
        (format!("gbm:{}", render_node()?), "vgem"),
        ("gbm".to_owned(), ""),
    ] {
        let options = format!("pipe --from vivid --to {name} --format XR24 --path zero-copy --frames 20 --json");
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| name.clone())?;
        imported(&result, "exported", 20).with_context(|| name.clone())?;
        let sink = result["sink"].as_str().context("sink")?;
        let node = sink.strip_prefix("gbm:").context("its name")?;
        ensure!(Path::new(node).exists(), "{sink} does not name a node");
        ensure!(driver != "vkms" || Path::new(node) == card, "{sink} is not vkms");
        ensure!(driver != "vgem" || Path::new(node) != card, "{sink} is not vgem");
        ensure!(result.get("verify").is_none() && result.get("mode").is_none(), "{result}");
        before.is_back()?;
    }
    finish(&mut dmaflow("pipe --from vivid --to gbm:vkms --verify --frames 2"))?.has_status(2)?;
    finish(&mut dmaflow("pipe --from vivid --to gbm: --frames 2"))?.has_status(2)?;
    // A copy, where that is asked for, goes into buffers that the device imports as well.
    let copy = "pipe --from vivid --to gbm:vkms --format XR24 --path copy --frames 4 --json";
    let result = finish(&mut dmaflow(copy))?.json(0)?;
    ensure!(result["path"] == "copied" && number(&result, "bytes_copied")? == 4 * 640 * 360 * 4, "{result}");
    // It drives no display: that one can be driven meanwhile.
    let _device = Device::find("vkms")?;
    drop(Display::find("vkms", DisplayRequest::default())?);
    PASSED
}

/// A refusal that names these words, with a reason and a repair.
fn says(refusal: &Refusal, words: &[&str]) -> Result<()> {
    ensure!(!refusal.why.is_empty() && !refusal.repair.is_empty() && refusal.rung == Rung::Exported, "{refusal:?}");
    let text = refusal.to_string();
    for word in words {
        ensure!(text.contains(word), "no {word:?} in: {text}");
    }
    Ok(())
}

/// What the small tries have found holds for real pictures, in one memory plane and in one for each colour plane; the rest is refused.
fn every_format() -> anyhow::Result<Outcome> {
    for driver in ["vkms", "vgem"] {
        let device = Device::find(driver)?;
        let formats = device.formats().context("no memory to try formats with")?.to_vec();
        for name in ["XR24", "AR24", "XB24", "AB24", "RG16", "YUYV", "UYVY"] {
            ensure!(formats.contains(&format(name)), "no {name} in {formats:?}");
        }
        let mut refused = 0;
        for candidate in Format::all() {
            let one = shared(&candidate.to_string(), (320, 180))?;
            let strides: Vec<_> = one.layout().planes().iter().map(|plane| plane.stride).collect();
            let apart = Layout::separate(candidate, (320, 180), &strides)?;
            let apart = Buffer::allocate(Allocator::Udmabuf, &apart, &Room::default())?;
            for buffer in [one, apart] {
                let planes = buffer.memory().len();
                match device.import(&buffer, Usage::default()) {
                    Ok(_) => ensure!(formats.contains(&candidate), "{candidate} in {planes} planes, of {formats:?}"),
                    Err(refusal) => {
                        ensure!(!formats.contains(&candidate), "{candidate} in {planes} planes: {refusal}");
                        says(&refusal, &[&candidate.to_string(), "gbm_bo_import", "XR24"])?;
                        ensure!(refusal.why.contains("DRM has no code") || refusal.why.contains(driver), "{refusal}");
                        refused += 1;
                    }
                }
            }
        }
        ensure!(refused > 0, "nothing was refused");
        let names: Vec<_> = formats.iter().map(ToString::to_string).collect();
        note(&format!("{driver} imports {}; {refused} refusals", names.join(" ")));
    }
    PASSED
}

/// The camera's own buffers, NV12 in one memory plane and in two among them.
fn formats_of_the_camera() -> anyhow::Result<Outcome> {
    let before = State::read();
    let taken = Device::find("vkms")?.formats().context("formats")?.to_vec();
    vivid(&["multiplanar=2"])?;
    for (name, planes) in [("AR24", 1), ("RG16", 1), ("YUYV", 1), ("NV12", 1), ("NM12", 2), ("YU12", 1), ("GREY", 1)] {
        let known = Format::parse(name).context(name)?.0;
        let options = format!("pipe --from vivid --to gbm:vkms --format {name} --path zero-copy --frames 3 --json");
        let run = finish(&mut dmaflow(&options))?;
        let result = run
            .json(if taken.contains(&known) { 0 } else { 3 })
            .with_context(|| name.to_owned())?;
        ensure!(number(&result, "memory_planes")? == planes, "{result}");
        if taken.contains(&known) {
            imported(&result, "exported", 3).with_context(|| name.to_owned())?;
        } else {
            for refusal in result["refusals"].as_array().context("refusals")? {
                let why = refusal["why"].as_str().context("why")?;
                ensure!(why.contains(&known.to_string()), "{name}: {why}");
                ensure!(refusal["repair"].as_str().is_some_and(|repair| repair.contains("XR24")), "{name}: {refusal}");
            }
        }
        before.is_back()?;
    }
    PASSED
}

/// What is stated and what is not are two things, both ways.
fn linear_is_not_unstated() -> anyhow::Result<Outcome> {
    // A tiling that no software renderer has: Intel's X (drm_fourcc.h).
    let tiled = Modifier::from_drm(0x0100_0000_0000_0001).context("a modifier")?;
    let device = Device::find("vkms")?;
    let unstated = shared("XR24", (320, 180))?;
    ensure!(unstated.layout().modifier().is_none(), "{}", unstated.layout());
    device.import(&unstated, Usage::default()).map_err(anyhow::Error::new)?;
    let with =
        |modifier| Ok::<_, anyhow::Error>(unstated.with_layout(unstated.layout().with_modifier(Some(modifier)))?);
    match device.import(&with(Modifier::LINEAR)?, Usage::default()) {
        Ok(_) => note("LINEAR is taken where it is stated"),
        Err(refusal) => says(&refusal, &["tiling", "LINEAR", "vkms"])?,
    }
    let refusal = device
        .import(&with(tiled)?, Usage::default())
        .err()
        .context("a tiling that it cannot have")?;
    says(&refusal, &["gbm_bo_import", "tiling", "0x0100000000000001", "vkms"])?;

    let layout = Layout::packed(format("XR24"), (320, 180), 1)?;
    let room = Room::default();
    for modifiers in [&[][..], &[Modifier::LINEAR], &[tiled, Modifier::LINEAR]] {
        let made = device.make_buffer(&layout, &room, Usage::SCANOUT, modifiers)?;
        let stated = made.layout().modifier();
        ensure!(stated.is_none_or(|stated| stated == Modifier::LINEAR), "{stated:?} of {modifiers:?}");
        note(&format!("of {modifiers:?} it makes {stated:?}"));
    }
    let error = device
        .make_buffer(&layout, &room, Usage::SCANOUT, &[tiled])
        .err()
        .context("a tiled buffer")?;
    ensure!(error.kind() == Kind::Unsupported || error.errno().is_some(), "{}", error.line());
    PASSED
}

/// Buffers that the CPU can fill and read, of the size that was asked for and with the room.
fn what_it_makes() -> anyhow::Result<Outcome> {
    for driver in ["vkms", "vgem"] {
        let device = Device::find(driver)?;
        let made = device.formats_made();
        ensure!(made.contains(&format("XR24")) && made.contains(&format("RG16")), "{driver}: {made:?}");
        for candidate in Format::all() {
            let layout = Layout::packed(candidate, (321, 181), 1)?;
            let modifiers = [Modifier::LINEAR];
            let buffer = device.make_buffer(&layout, &Room::default(), Usage::RENDERING, &modifiers);
            match buffer {
                Ok(buffer) => {
                    ensure!(made.contains(&candidate), "{candidate} of {made:?}");
                    ensure!(buffer.layout().size() == (321, 181) && buffer.is_dma_buf(), "{}", buffer.layout());
                }
                Err(error) => {
                    ensure!(!made.contains(&candidate) && error.kind() == Kind::Unsupported, "{}", error.line());
                    ensure!(error.line().contains(&candidate.to_string()), "{}", error.line());
                }
            }
        }
        let layout = Layout::packed(format("XR24"), (64, 16), 1)?;
        let room = Room::for_lens(&[100_000]);
        let buffer = device.make_buffer(&layout, &room, Usage::RENDERING, &[Modifier::LINEAR])?;
        ensure!(buffer.memory_lens()[0] >= 100_000 && buffer.layout().size() == (64, 16), "{:?}", buffer.memory_lens());
        let too_much = Room::for_lens(&[1 << 33]);
        let refused = device.make_buffer(&layout, &too_much, Usage::RENDERING, &[Modifier::LINEAR]);
        let error = refused.err().context("8 GiB of rows")?;
        ensure!(error.kind() == Kind::Invalid && error.known_repair().is_some(), "{}", error.line());
        buffer.write()?.row(0, 3, &[0xa5; 256]);
        let mut row = [0; 256];
        buffer.read()?.row(0, 3, &mut row);
        ensure!(row == [0xa5; 256], "{driver}: what was written is not what is read");
    }
    // A driver's name means one node of its device, and a card's device the same: here the card, which alone has dumb buffers.
    for (driver, has_render) in [("vkms", false), ("vgem", true)] {
        let card = Device::find(driver)?.info().path.clone();
        ensure!(card.display().to_string().starts_with("/dev/dri/card"), "{driver} is {}", card.display());
        ensure!(Device::of_card(&card)?.info().path == card, "{driver} is another device");
        let listed = Device::list()
            .into_iter()
            .flatten()
            .filter(|device| device.info().driver == driver);
        ensure!(listed.count() == 1 + usize::from(has_render), "the nodes of {driver}");
    }
    // The kernel's dumb buffers are a card's; the render node says so.
    let device = Device::find(&render_node()?)?;
    let layout = Layout::packed(format("XR24"), (64, 16), 1)?;
    let made = device.make_buffer(&layout, &Room::default(), Usage::RENDERING, &[Modifier::LINEAR]);
    let line = made.err().context("vgem makes dumb buffers through its render node")?.line();
    ensure!(line.contains("card") && line.contains("renderD"), "{line}");
    PASSED
}

fn open_nodes(driver_node: &Path) -> Result<usize> {
    let fds = fs::read_dir("/proc/self/fd")?.flatten();
    Ok(fds
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == driver_node))
        .count())
}

fn buffers_outlive() -> anyhow::Result<Outcome> {
    let node = card()?;
    ensure!(open_nodes(&node)? == 0, "it is open already");
    let device = Device::open(&node)?;
    let layout = Layout::packed(format("XR24"), (320, 180), 1)?;
    let made = device.make_buffer(&layout, &Room::default(), Usage::SCANOUT, &[Modifier::LINEAR])?;
    let from_outside = shared("XR24", (320, 180))?;
    let images = [
        device.import(&made, Usage::default()).map_err(anyhow::Error::new)?,
        device.import(&from_outside, Usage::default()).map_err(anyhow::Error::new)?,
    ];
    drop(device);
    ensure!(open_nodes(&node)? > 0, "the images have lost their device");
    let [first, second] = images;
    drop(first);
    ensure!(open_nodes(&node)? > 0, "the second image has lost its device");
    drop(second);
    ensure!(open_nodes(&node)? == 0, "the device is open though nobody has it");
    // Memory that was made outlives it too, and another device takes it.
    made.write()?.row(0, 0, &[7; 1280]);
    let again = Device::open(&node)?;
    drop(again.import(&made, Usage::default()).map_err(anyhow::Error::new)?);
    let mut row = [0; 1280];
    made.read()?.row(0, 0, &mut row);
    ensure!(row == [7; 1280], "the memory was lost");
    PASSED
}

/// libgbm's own mapping, asked without dmaflow.
fn map_by_gbm(bo: *mut c_void) -> Result<bool> {
    type Map = unsafe extern "C" fn(*mut c_void, u32, u32, u32, u32, u32, *mut u32, *mut *mut c_void) -> *mut c_void;
    type Unmap = unsafe extern "C" fn(*mut c_void, *mut c_void);
    let (mut stride, mut data) = (0, std::ptr::null_mut());
    // SAFETY: the library is open already; both functions are as gbm.h declares them, the object is alive, and what is mapped is unmapped.
    unsafe {
        let library = libloading::Library::new("libgbm.so.1")?;
        let map = library.get::<Map>(b"gbm_bo_map\0")?;
        let unmap = library.get::<Unmap>(b"gbm_bo_unmap\0")?;
        let mapped = map(bo, 0, 0, 64, 64, 1, &raw mut stride, &raw mut data);
        if !mapped.is_null() {
            unmap(bo, data);
        }
        Ok(!mapped.is_null())
    }
}

fn our_own_mapping() -> anyhow::Result<Outcome> {
    let mut camera = open("XR24", (320, 180))?;
    let device = Device::find("vkms")?;
    let frame = camera.next()?;
    let image = device.import(frame.buffer(), Usage::default()).map_err(anyhow::Error::new)?;
    note(&format!("gbm_bo_map of an imported buffer works: {}", map_by_gbm(image.as_ptr())?));
    let bytes = picture(&frame)?;
    ensure!(bytes.iter().any(|byte| *byte != bytes[0]), "a picture of one colour: {}", bytes[0]);
    PASSED
}

/// Captured into GBM's memory, shown by vkms, compared by its CRC.
fn its_buffers_on_the_display() -> anyhow::Result<Outcome> {
    let _witness = Witness::new()?;
    let before = State::read();
    for name in ["XR24", "AR24", "RG16"] {
        let options = format!("pipe --from vivid --to vkms --format {name} --memory gbm --frames 5 --verify --json");
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| name.to_owned())?;
        imported(&result, "reverse", 5).with_context(|| name.to_owned())?;
        ensure!(number(&result, "verify/checked")? == 5 && number(&result, "verify/wrong")? == 0, "{result}");
        before.is_back()?;
    }
    // The same in a program.
    let mut camera = open("XR24", (640, 360))?;
    let mut display = Display::find("vkms", DisplayRequest { verify: true, ..DisplayRequest::default() })?;
    let limits = Limits { frames: Some(3), duration: None };
    let pipe = Pipe::join(&mut camera, &mut display, Way::Reverse(Maker::Gbm), limits)?;
    ensure!(pipe.rung() == Rung::Reverse, "{:?}", pipe.refusals());
    let account = pipe.run(None, &mut |_| {})?;
    let verdict = display.verdict().context("no verdict")?;
    ensure!(account.copies.bytes() == 0 && verdict.checked == 3 && verdict.wrong == 0, "{verdict:?}");
    drop((camera, display));
    before.is_back()?;
    // What vkms shows no format of is refused before anything is made.
    let run = finish(&mut dmaflow("pipe --from vivid --to vkms --format YUYV --memory gbm --frames 2 --json"))?;
    let result = run.json(3)?;
    ensure!(result["refusals"][0]["rung"] == "reverse" && result.to_string().contains("YUYV"), "{result}");
    PASSED
}

/// The other makers, by the same option, into the device itself.
fn memory_on_demand() -> anyhow::Result<Outcome> {
    let before = State::read();
    for memory in ["sink", "heap", "udmabuf"] {
        let options = format!("pipe --from vivid --to gbm:vkms --format XR24 --memory {memory} --frames 5 --json");
        let result = finish(&mut dmaflow(&options))?.json(0).with_context(|| memory.to_owned())?;
        imported(&result, "reverse", 5).with_context(|| memory.to_owned())?;
        before.is_back()?;
    }
    let none = finish(&mut dmaflow("pipe --from vivid --to null --memory sink --frames 2"))?;
    none.one_line(3, &["null", "no memory of its own"])?;
    let reads = finish(&mut dmaflow("pipe --from vivid --to png:/tmp/never.png --memory udmabuf --frames 2"))?;
    reads.one_line(3, &["reverse", "CPU"])?;
    finish(&mut dmaflow("pipe --from vivid --to null --memory heap --path copy --frames 2"))?.has_status(2)?;
    ensure!(!Path::new("/tmp/never.png").exists(), "a copy in spite of the demand");
    // The CPU writes into GBM's memory.
    let run = finish(&mut dmaflow("pipe --from pattern --to vkms --memory gbm --frames 3 --verify --json"))?;
    let result = run.json(0)?;
    imported(&result, "reverse", 3)?;
    ensure!(number(&result, "verify/checked")? == 3 && number(&result, "verify/wrong")? == 0, "{result}");
    before.is_back()?;
    PASSED
}

fn refusals() -> anyhow::Result<Outcome> {
    // No DRM device, by name and by descriptor. gbm_create_device takes the first two.
    for file in ["/dev/null", "/dev/udmabuf", "/proc/self/exe"] {
        let error = match fs::File::options().read(true).write(file.starts_with("/dev")).open(file) {
            Ok(opened) => Device::from_fd(OwnedFd::from(opened)).err().context(file)?,
            Err(error) => anyhow::bail!("{file}: {error}"),
        };
        ensure!(error.kind() == Kind::Unsupported && error.line().contains("not a DRM device"), "{}", error.line());
    }
    let run = finish(&mut dmaflow("pipe --from pattern --to gbm:/dev/null --frames 2"))?;
    run.one_line(1, &["/dev/null", "not a DRM device"])?;
    let nosuch = Device::find("nosuch").err().context("nosuch")?;
    ensure!(nosuch.kind() == Kind::NotFound && nosuch.line().contains("(vkms)"), "{}", nosuch.line());
    // libgbm without a part for the driver.
    let mut command = dmaflow("pipe --from pattern --to gbm:vkms --frames 2");
    let run = finish(command.env("GBM_BACKENDS_PATH", "/nonexistent"))?;
    run.has_status(1)?;
    ensure!(run.stderr.contains("error: cannot ") && run.stderr.contains("libgl1-mesa-dri"), "{}", run.stderr);

    let device = Device::find("vkms")?;
    let layout = Layout::packed(format("XR24"), (64, 48), 1)?;
    let plain = Buffer::allocate(Allocator::Plain, &layout, &Room::default())?;
    let refusal = device.import(&plain, Usage::default()).err().context("plain memory")?;
    says(&refusal, &["plain memory", "PRIME", "udmabuf"])?;
    let mut sink = Gbm::new(device.clone());
    let joined = sink.join(&layout, None, &[]);
    ensure!(joined.is_err(), "no buffers were joined");
    // A pipe's end is no dma-buf, whatever its length.
    let (_end, pipe) = nix::unistd::pipe()?;
    ensure!(dmaflow::dmabuf::DmaBuf::new(pipe).is_err(), "a pipe is a dma-buf");
    PASSED
}

/// The library is hidden from the command alone.
fn without_libgbm() -> anyhow::Result<Outcome> {
    let hidden = |arguments: &str| {
        let program = dmaflow("").get_program().to_string_lossy().into_owned();
        let hide =
            "for file in $(readlink -f /usr/lib/*/libgbm.so.1); do mount --bind /dev/null $file || exit 99; done";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &format!("{hide}; exec {program} {arguments}")]);
        command
    };
    let run = finish(&mut hidden("pipe --from vivid --to gbm --frames 2"))?;
    run.one_line(1, &["libgbm.so.1", "libgbm1"])?;
    let run = finish(&mut hidden("list --json"))?;
    let result = run.json(0)?;
    let why = result["gbm"]["why_not"][0].as_str().context("why_not")?;
    ensure!(why.contains("libgbm.so.1") && result["gbm"]["devices"] == Value::Array(vec![]), "{result}");
    // Everything else works as ever.
    let run = finish(&mut hidden("pipe --from vivid --to null --frames 3 --json"))?;
    ensure!(number(&run.json(0)?, "frames/presented")? == 3, "{}", run.stdout);
    PASSED
}

fn rungs() -> anyhow::Result<Outcome> {
    let before = State::read();
    let run = finish(&mut dmaflow("probe --from vivid --to gbm:vkms --size 320x180 --json"))?;
    let result = run.json(0)?;
    before.is_back()?;
    let pair = &result["probes"][0];
    ensure!(pair["importer"] == "vkms" && pair["sink"].as_str().is_some_and(|sink| sink.starts_with("gbm:")), "{pair}");
    let formats = pair["formats"].as_array().context("formats")?;
    let rung = |name: &str, rung: &str| {
        let found = formats.iter().find(|entry| entry["format"] == name);
        let rungs = found.and_then(|entry| entry["rungs"].as_array());
        rungs
            .and_then(|rungs| rungs.iter().find(|entry| entry["rung"] == rung))
            .cloned()
            .context(name.to_owned())
    };
    for name in ["XR24", "AR24", "RG16"] {
        for step in ["exported", "reverse", "copied"] {
            ensure!(rung(name, step)?["ok"] == true, "{name} {step}: {}", rung(name, step)?);
        }
        ensure!(rung(name, "reverse")?["memory"] == pair["sink"], "{}", rung(name, "reverse")?);
    }
    // Imported, but not made: memory of others.
    ensure!(rung("YUYV", "exported")?["ok"] == true && rung("YUYV", "reverse")?["ok"] == true, "{pair}");
    ensure!(rung("YUYV", "reverse")?["memory"] != pair["sink"], "{}", rung("YUYV", "reverse")?);
    ensure!(
        rung("GREY", "exported")?["refusals"].to_string().contains("gbm_bo_import"),
        "{}",
        rung("GREY", "exported")?
    );
    PASSED
}

fn listed() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("list --json"))?;
    let result = run.json(0)?;
    let devices = result["gbm"]["devices"].as_array().context("devices")?;
    ensure!(result["gbm"]["why_not"] == Value::Array(vec![]), "{result}");
    for driver in ["vkms", "vgem"] {
        let of = devices.iter().filter(|device| device["driver"] == driver);
        let has = |what: &str| of.clone().any(|device| device[what].to_string().contains("\"XR24\""));
        ensure!(has("imports") && has("makes"), "{driver}: {devices:?}");
    }
    // What Mesa has to say of these devices stands in the result, each line once, and not before it.
    let said = result["gbm"]["said"].as_array().context("said")?;
    ensure!(run.stderr.is_empty(), "{}", run.stderr);
    ensure!(said.iter().filter(|line| **line == "kmsro: driver missing").count() == 1, "{said:?}");
    let table = finish(&mut dmaflow("list"))?;
    ensure!(table.stderr.is_empty(), "{}", table.stderr);
    ensure!(table.stdout.contains("said by libgbm: kmsro"), "{}", table.stdout);
    ensure!(table.stdout.contains("\nGBM\n") && table.stdout.contains("imports  XR24"), "{}", table.stdout);
    PASSED
}

/// Made, imported through the cache, dropped: nothing grows, and nothing is attached any more.
fn a_thousand() -> anyhow::Result<Outcome> {
    let device = Device::find("vkms")?;
    let layout = Layout::packed(format("XR24"), (64, 48), 1)?;
    let mut importer = GbmImporter::new(device.clone());
    comes_to_a_level("made and imported", &mut || {
        let mut cache = ImportCache::new();
        let buffers = [
            shared("XR24", (64, 48))?,
            shared("RG16", (64, 48))?,
            device.make_buffer(&layout, &Room::default(), Usage::SCANOUT, &[Modifier::LINEAR])?,
        ];
        for buffer in buffers.iter().chain(&buffers) {
            cache.get(&mut importer, buffer).map_err(anyhow::Error::new)?;
        }
        ensure!(cache.imports() == 3, "{} imports of 3 buffers", cache.imports());
        ensure!(importer.import(&shared("GREY", (64, 48))?).is_err(), "GREY is imported");
        Ok(())
    })?;
    PASSED
}
