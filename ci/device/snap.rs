//! Pictures of sources and of what a display shows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmaflow::format::{Format, Kind};
use nix::sys::signal::Signal;

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{Witness, kernel, vivid};
use crate::process::{State, dmaflow, finish, number, pipe, sh, start};
use crate::sinks::{has_bars, read_png};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "snap::a_camera", needs: NEEDS, seconds: 60, run: a_camera },
    Test { name: "snap::every_format_of_a_camera", needs: NEEDS, seconds: 600, run: every_format },
    Test { name: "snap::every_multi_planar_format", needs: NEEDS, seconds: 240, run: every_multi_planar_format },
    Test { name: "snap::the_pattern", needs: &[], seconds: 60, run: the_pattern },
    Test { name: "snap::the_console", needs: NEEDS, seconds: 60, run: the_console },
    Test { name: "snap::a_display_that_another_drives", needs: NEEDS, seconds: 120, run: another_drives },
    Test { name: "snap::at_the_end_of_a_pipe", needs: NEEDS, seconds: 120, run: at_the_end },
    Test { name: "snap::by_writeback", needs: NEEDS, seconds: 120, run: by_writeback },
];

const FILE: &str = "/tmp/snap.png";

type Picture = ((u32, u32), Vec<u8>);

fn snapped(options: &str) -> Result<Picture> {
    let _ = fs::remove_file(FILE);
    let run = finish(&mut dmaflow(&format!("snap {options}")))?;
    run.has_status(0)?;
    ensure!(run.stdout.is_empty(), "{}", run.stdout);
    read_png(Path::new(FILE))
}

fn a_camera() -> anyhow::Result<Outcome> {
    for (options, size) in [
        ("--format XR24 --size 640x360", (640, 360)),
        ("--format NV12 --size 1280x720", (1280, 720)),
        ("", (1280, 720)),
        ("--input 3 --format XR24 --size 720x576", (720, 576)),
    ] {
        let picture = snapped(&format!("vivid {FILE} {options}"))?;
        ensure!(options.is_empty() || picture.0 == size, "{options}: {:?}", picture.0);
        ensure!(has_bars(&picture), "{options}: no colour bars");
    }
    PASSED
}

/// The codes of the camera's formats, as another program lists them.
fn codes() -> Result<Vec<String>> {
    let list = sh("v4l2-ctl -d /dev/video0 --list-formats")?;
    // `[27]: 'Y16 -BE' (16-bit Greyscale BE, …)`
    let code = |line: &str| Some(line.split('\'').nth(1)?.replace(' ', ""));
    Ok(list
        .lines()
        .filter(|line| line.trim_start().starts_with('['))
        .filter_map(code)
        .collect())
}

/// The colours in the middles of the eight bars, below the text.
fn bars(picture: &Picture) -> Vec<[u8; 3]> {
    (0..8).map(|bar| pixel(picture, (40 + 80 * bar, 330))).collect()
}

/// How far a bar may be from what XR24 shows: what the format's bits lose (the camera cuts off and does not round), and rounding.
fn tolerance(format: Format) -> u8 {
    let step = |bits: u8| 255 / ((1u16 << bits) - 1);
    let most = match format.kind() {
        Kind::Rgb { channels, .. } => 3 + channels.map(|bits| step(bits.width)).into_iter().max().unwrap_or(1),
        // Of luma, and of chroma times up to 2.1.
        Kind::YuvWord { channels, .. } => 4 + 3 * channels.map(|bits| step(bits.width)).into_iter().max().unwrap_or(1),
        // Two steps of hue: six times 85 by which vivid divides a turn are not 256, and rounding.
        Kind::Hsv { .. } => 10,
        _ => 6,
    };
    u8::try_from(most).unwrap_or(u8::MAX)
}

fn each_format(codes: &[String]) -> Result<()> {
    let expected = bars(&snapped(&format!("vivid {FILE} --format XR24 --size 640x360"))?);
    ensure!(expected.iter().collect::<BTreeSet<_>>().len() == 8, "{expected:?}");
    let mut wrong = Vec::new();
    for code in codes {
        let format = Format::parse(&format!("v4l2:{code}"))
            .with_context(|| format!("{code} is not known"))?
            .0;
        let picture = snapped(&format!("vivid {FILE} --format v4l2:{code} --size 640x360"))?;
        ensure!(picture.0 == (640, 360), "{code}: {:?}", picture.0);
        let grey = matches!(format.kind(), Kind::Grey | Kind::DeepGrey { .. });
        for (bar, (got, want)) in std::iter::zip(bars(&picture), &expected).enumerate() {
            let [r, g, b] = want.map(f64::from);
            // Whatever the encoding, vivid makes grey with the weights of BT.709.
            let luma = (0.2126 * r + 0.7152 * g + 0.0722 * b).round() as u8;
            let want = if grey { [luma; 3] } else { *want };
            let apart = std::iter::zip(got, want).map(|(got, want)| got.abs_diff(want)).max();
            if apart > Some(tolerance(format)) {
                wrong.push(format!("{code} bar {bar}: {got:?}, not {want:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn every_format() -> anyhow::Result<Outcome> {
    let codes = codes()?;
    ensure!(codes.len() > 80, "{codes:?}");
    each_format(&codes)?;
    note(&format!("{} formats", codes.len()));
    PASSED
}

/// Those that have a memory plane for each colour plane; the others are as they were.
fn every_multi_planar_format() -> anyhow::Result<Outcome> {
    let single = codes()?;
    vivid(&["multiplanar=2"])?;
    let more: Vec<_> = codes()?.into_iter().filter(|code| !single.contains(code)).collect();
    ensure!(more.len() >= 8, "{more:?}");
    each_format(&more)?;
    note(&more.join(" "));
    PASSED
}

fn the_pattern() -> anyhow::Result<Outcome> {
    for format in ["XR24", "NV12", "GREY"] {
        let picture = snapped(&format!("pattern {FILE} --format {format} --size 320x180"))?;
        ensure!(picture.0 == (320, 180), "{:?}", picture.0);
        ensure!(format == "GREY" || has_bars(&picture), "{format}: no colour bars");
    }
    PASSED
}

/// Nobody but the kernel drives it.
fn the_console() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let card = crate::modules::card()?.display().to_string();
    for name in ["vkms", &card, "vkms"] {
        let picture = snapped(&format!("{name} {FILE} --via framebuffers"))?;
        ensure!(picture.0 == (1024, 768), "{:?}", picture.0);
    }
    // A dma-buf of the console's memory would stay for as long as the console, and keep the driver's module in use.
    before.is_back()?;
    drop(witness);
    PASSED
}

fn pixel(((width, _), rgb): &Picture, (x, y): (u32, u32)) -> [u8; 3] {
    let at = ((y * width + x) * 3) as usize;
    [rgb[at], rgb[at + 1], rgb[at + 2]]
}

/// 640x360 in the middle of 640x480 (the mode for 30 frames a second): bars between two black bands.
fn is_the_camera_on_640x480(picture: &Picture) -> Result<()> {
    ensure!(picture.0 == (640, 480), "{:?}", picture.0);
    ensure!(has_bars(picture), "no colour bars");
    for y in [0, 30, 59, 420, 450, 479] {
        for x in [0, 100, 320, 639] {
            ensure!(pixel(picture, (x, y)) == [0, 0, 0], "({x}, {y}) is {:?} and not black", pixel(picture, (x, y)));
        }
    }
    ensure!(pixel(picture, (20, 240)) != [0, 0, 0], "the picture does not begin where it should");
    Ok(())
}

fn another_drives() -> anyhow::Result<Outcome> {
    let before = State::read();
    for format in if kernel() >= (7, 0) { &["XR24", "RG16", "NV12"][..] } else { &["XR24", "RG16"][..] } {
        let mut running = start(&mut pipe(&format!("--format {format} --size 640x360 --fps 30")))?;
        running.wait_until_it_shows()?;
        is_the_camera_on_640x480(&snapped(&format!("vkms {FILE} --via framebuffers"))?)?;
        // Left to choose, it may not disturb the one who drives it.
        is_the_camera_on_640x480(&snapped(&format!("vkms {FILE}"))?)?;
        ensure!(running.runs(), "it was disturbed");
        running.signal(Signal::SIGINT)?;
        let result = running.end()?.json(0)?;
        ensure!(number(&result, "frames/presented")? > 3, "{result}");
        before.is_back()?;
    }
    PASSED
}

fn at_the_end() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for options in ["--present fifo", "--present mailbox", "--present fifo --verify"] {
        let _ = fs::remove_file(FILE);
        finish(&mut pipe(&format!("--format XR24 --size 640x360 --fps 30 --frames 4 --snap {FILE} {options}")))?
            .json(0)?;
        is_the_camera_on_640x480(&read_png(Path::new(FILE))?)?;
        before.is_back()?;
    }
    // Of no frame there is no picture; least of all that of the console.
    let _ = fs::remove_file(FILE);
    let run = finish(&mut pipe(&format!("--format XR24 --size 640x360 --seconds 0.001 --snap {FILE}")))?;
    run.one_line(1, &[FILE, "no frame was shown"])?;
    ensure!(fs::metadata(FILE).is_err(), "a picture of no frame");
    before.is_back()?;
    let run = finish(&mut pipe("--format XR24 --size 640x360 --frames 2 --snap /tmp/no/such/x.png"))?;
    run.one_line(1, &["/tmp/no/such/x.png"])?;
    before.is_back()?;
    finish(&mut dmaflow(&format!("pipe --from vivid --to null --frames 2 --snap {FILE}")))?.has_status(2)?;
    drop(witness);
    PASSED
}

/// The hardware's own picture must be the composed one. Linux 6.12's vkms cannot do it beside a running display.
fn by_writeback() -> anyhow::Result<Outcome> {
    // Something to see. The kernel may write on the console as well, at any time: a picture before and one after tell whether it did.
    fs::write("/dev/tty0", "\x1b[2J\x1b[Hwhat is written back\r\n\x1b[41m is what is shown \x1b[0m\r\n")?;
    for _ in 0..5 {
        let composed = snapped(&format!("vkms {FILE} --via framebuffers"))?;
        let before = State::read();
        let run = finish(&mut dmaflow(&format!("snap vkms {FILE}.wb --via writeback")))?;
        before.is_back()?;
        if !run.status.success() {
            ensure!(kernel() < (7, 0), "writeback works on this kernel: {}", run.stderr);
            note(run.one_line(1, &["write back"])?);
            return PASSED;
        }
        let written = read_png(Path::new(&format!("{FILE}.wb")))?;
        if snapped(&format!("vkms {FILE} --via framebuffers"))? != composed {
            note("the console changed meanwhile");
            continue;
        }
        let different = written
            .1
            .iter()
            .zip(&composed.1)
            .filter(|(written, composed)| written != composed)
            .count();
        ensure!(
            written.0 == composed.0 && different == 0,
            "{different} bytes of the writeback ({:?}) are not those of the framebuffers ({:?})",
            written.0,
            composed.0
        );
        note("by writeback: equal");
        return PASSED;
    }
    anyhow::bail!("the console changes all the time")
}
