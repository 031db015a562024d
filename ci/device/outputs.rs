//! Frames as streams of bytes: `raw:` and `y4m:` into files, pipes and FFmpeg.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{control, kernel, vivid};
use crate::process::{State, dmaflow, finish, number, sh, start_as_it_is};

const NEEDS: &[&str] = &["vivid"];

pub const TESTS: &[Test] = &[
    Test { name: "outputs::raw_through_a_pipe", needs: NEEDS, seconds: 180, run: through_a_pipe },
    Test { name: "outputs::several_memory_planes", needs: NEEDS, seconds: 120, run: several_memory_planes },
    Test { name: "outputs::memory_that_a_pipe_does_not_take", needs: NEEDS, seconds: 120, run: other_memory },
    Test { name: "outputs::copies_on_demand", needs: NEEDS, seconds: 60, run: on_demand },
    Test { name: "outputs::files", needs: NEEDS, seconds: 120, run: files },
    Test { name: "outputs::y4m_by_ffmpeg", needs: &["udmabuf", "ffmpeg"], seconds: 180, run: by_ffmpeg },
    Test { name: "outputs::a_camera_by_ffmpeg", needs: &["vivid", "ffmpeg"], seconds: 240, run: camera_by_ffmpeg },
    Test { name: "outputs::a_reader_that_goes", needs: NEEDS, seconds: 60, run: reader_goes },
    Test { name: "outputs::a_slow_reader", needs: NEEDS, seconds: 60, run: slow_reader },
    Test { name: "outputs::nobody_reads", needs: NEEDS, seconds: 60, run: nobody_reads },
    Test { name: "outputs::a_named_pipe", needs: NEEDS, seconds: 60, run: named_pipe },
    Test { name: "outputs::wrong_usage", needs: NEEDS, seconds: 60, run: wrong_usage },
];

const OUT: &str = "/tmp/outputs.raw";
const RESULT: &str = "/tmp/outputs.json";

/// Runs `pipe` with its frames through another program into a file, and gives the result, which is on stderr then.
fn through(program: &str, arguments: &str) -> Result<Value> {
    sh(&format!("dmaflow pipe --json {arguments} 2>{RESULT} | {program}"))?;
    result()
}

fn result() -> Result<Value> {
    let text = fs::read_to_string(RESULT)?;
    serde_json::from_str(&text).with_context(|| format!("no result but: {text}"))
}

/// A frame of vivid as another program captures it: with nothing in the picture that moves, all frames are alike.
fn still(format: &str, more: &str) -> Result<Vec<u8>> {
    let file = "/tmp/outputs.still";
    sh(&format!(
        "v4l2-ctl -d /dev/video0 -c osd_text_mode=2 -v width=640,height=360,pixelformat={format}{more} \
         --stream-mmap --stream-count=1 --stream-to={file}"
    ))?;
    Ok(fs::read(file)?)
}

/// Whether a file is `count` times one frame.
fn is_all(file: &str, frame: &[u8], count: usize) -> Result<()> {
    let bytes = fs::read(file)?;
    ensure!(bytes.len() == frame.len() * count, "{} bytes instead of {count} times {}", bytes.len(), frame.len());
    for (place, one) in bytes.chunks_exact(frame.len()).enumerate() {
        let wrong = one.iter().zip(frame).position(|(a, b)| a != b);
        ensure!(wrong.is_none(), "frame {place} differs from byte {wrong:?} on");
    }
    Ok(())
}

fn through_a_pipe() -> anyhow::Result<Outcome> {
    for format in ["XR24", "YUYV", "NV12", "RGB3", "GREY"] {
        let frame = still(format, "")?;
        let options = format!("--from vivid --to raw:- --format {format} --size 640x360 --frames 20");
        let result = through(&format!("cat >{OUT}"), &options)?;
        is_all(OUT, &frame, 20).with_context(|| format.to_owned())?;
        ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{format}: {result}");
        ensure!(number(&result, "frames/presented")? == 20, "{result}");
    }
    // Rows with padding between them, which does not go.
    let frame = still("XR24", "")?;
    let result = through(
        &format!("cat >{OUT}"),
        "--from vivid --to raw:- --format XR24 --size 640x360 --stride 2816 --frames 8",
    )?;
    is_all(OUT, &frame, 8)?;
    ensure!(number(&result, "bytes_copied")? == 0 && result["stride"][0] == 2816, "{result}");
    PASSED
}

fn several_memory_planes() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    for format in ["NM12", "YM12"] {
        sh("v4l2-ctl -d /dev/video0 -c osd_text_mode=2")?;
        let options = format!("--from vivid --to raw:- --format {format} --size 640x360 --frames 5");
        let result = through(&format!("cat >{OUT}"), &options)?;
        let bytes = fs::read(OUT)?;
        ensure!(bytes.len() == 640 * 360 * 3 / 2 * 5, "{format}: {} bytes", bytes.len());
        is_all(OUT, &bytes[..640 * 360 * 3 / 2], 5)?;
        ensure!(number(&result, "bytes_copied")? == 0 && number(&result, "memory_planes")? > 1, "{result}");
    }
    PASSED
}

/// Contiguous memory is mapped by page numbers, which a pipe does not take; nor can the camera fill other memory then.
fn other_memory() -> anyhow::Result<Outcome> {
    vivid(&["allocators=1"])?;
    let frame = still("YUYV", "")?;
    let options = "--from vivid --to raw:- --format YUYV --size 640x360 --frames 10";
    let result = through(&format!("cat >{OUT}"), options)?;
    is_all(OUT, &frame, 10)?;
    let copied = number(&result, "bytes_copied")?;
    note(&format!("{}: {copied} bytes copied", result["path"]));
    if result["path"] == "copied" {
        ensure!(copied == 640 * 360 * 2 * 10, "{result}");
        let refusal = &result["refusals"][0];
        ensure!(
            refusal["rung"] == "exported" && refusal["step"] == "vmsplice" && refusal["errno"] == "EFAULT",
            "{result}"
        );
    } else {
        ensure!(copied == 0, "{result}");
    }
    PASSED
}

fn on_demand() -> anyhow::Result<Outcome> {
    let frame = still("XR24", "")?;
    let options = "--from vivid --to raw:- --format XR24 --size 640x360 --frames 5 --path copy";
    let result = through(&format!("cat >{OUT}"), options)?;
    is_all(OUT, &frame, 5)?;
    ensure!(result["path"] == "copied" && number(&result, "bytes_copied")? == 640 * 360 * 4 * 5, "{result}");
    ensure!(result["copies"][0]["cause"] == "written into a pipe", "{result}");
    PASSED
}

fn files() -> anyhow::Result<Outcome> {
    let frame = still("NV12", "")?;
    let options = format!("pipe --from vivid --to raw:{OUT} --format NV12 --size 640x360 --frames 6 --json");
    let result = finish(&mut dmaflow(&options))?.json(0)?;
    is_all(OUT, &frame, 6)?;
    ensure!(result["path"] == "copied" && number(&result, "bytes_copied")? == 640 * 540 * 6, "{result}");
    ensure!(result["copies"][0]["cause"] == "written to a file", "{result}");
    // A camera that stands at YUYV and has planar YUV as well: no conversion.
    let options = format!("pipe --from vivid --to y4m:{OUT} --size 640x360 --fps 30 --frames 3 --json");
    let result = finish(&mut dmaflow(&options))?.json(0)?;
    let mut reader = BufReader::new(File::open(OUT)?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("YUV4MPEG2 W640 H360 F30:1 ") && line.contains(" XCOLORRANGE="), "{line}");
    let frame = if line.contains(" C422 ") { 640 * 360 * 2 } else { 640 * 360 * 3 / 2 };
    let left = reader.get_ref().metadata()?.len() - reader.stream_position()?;
    ensure!(left == 3 * (6 + frame), "{left} bytes after {line}, {result}");
    // One that is made to give YUYV: its samples in another order, and then into the file.
    let options = format!("pipe --from vivid --to y4m:{OUT} --format YUYV --size 640x360 --frames 2 --json");
    let result = finish(&mut dmaflow(&options))?.json(0)?;
    let causes = result["copies"].as_array().context("copies")?;
    ensure!(causes.len() == 2 && number(&result, "bytes_copied")? == 2 * 2 * 640 * 360 * 2, "{result}");
    ensure!(fs::read(OUT)?.starts_with(b"YUV4MPEG2 W640 H360 F60:1 Ip A0:0 C422 "), "the head of a 4:2:2 stream");
    PASSED
}

/// The same frames, as FFmpeg decodes them and as they are. While FFmpeg starts, the source drops some: what was decoded must be among
/// what was drawn, in order.
fn by_ffmpeg() -> anyhow::Result<Outcome> {
    for (format, bytes) in [("YU12", 160 * 90 * 3 / 2), ("YU16", 160 * 90 * 2), ("GREY", 160 * 90)] {
        let source = format!("--from pattern --format {format} --size 160x90 --fps 20");
        let ffmpeg = format!("ffmpeg -nostdin -v error -f yuv4mpegpipe -i - -f rawvideo -y {OUT}");
        let result = through(&ffmpeg, &format!("{source} --frames 60 --to y4m:-"))?;
        ensure!(number(&result, "frames/presented")? == 60, "{result}");
        ensure!(number(&result, "bytes_copied")? == 0 && result["path"] == "exported", "{result}");
        let drawn = 60 + number(&result, "frames/dropped_by_camera")?;
        note(&format!("{format}: 60 of {drawn} frames"));
        let expected = "/tmp/outputs.expected";
        let stored =
            finish(&mut dmaflow(&format!("pipe --json {source} --buffers 64 --frames {drawn} --to raw:{expected}")))?;
        let stored = stored.json(0)?;
        ensure!(number(&stored, "frames/dropped_by_camera")? == 0, "too slow to compare: {stored}");
        let (decoded, expected) = (fs::read(OUT)?, fs::read(expected)?);
        ensure!(decoded.len() == 60 * bytes, "{format}: {} bytes decoded", decoded.len());
        let mut drawn = expected.chunks_exact(bytes);
        for (place, frame) in decoded.chunks_exact(bytes).enumerate() {
            ensure!(drawn.any(|drawn| drawn == frame), "{format}: frame {place} was never drawn");
        }
    }
    fs::remove_file("/tmp/outputs.expected")?;
    PASSED
}

/// A picture's colour planes in the order of a YUV4MPEG2 stream, put there without the library: each with the bytes of one row.
fn planes(format: &str, frame: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
    const LUMA: usize = 640 * 360;
    let every = |bytes: &[u8], first: usize, step: usize| bytes.iter().copied().skip(first).step_by(step).collect();
    let chroma = |place: usize| frame[LUMA + place * LUMA / 4..][..LUMA / 4].to_vec();
    let luma = |bytes: &[u8]| (640, bytes[..LUMA].to_vec());
    Ok(match format {
        "YU12" => vec![luma(frame), (320, chroma(0)), (320, chroma(1))],
        "YV12" => vec![luma(frame), (320, chroma(1)), (320, chroma(0))],
        "NV12" => vec![luma(frame), (320, every(&frame[LUMA..], 0, 2)), (320, every(&frame[LUMA..], 1, 2))],
        "YUYV" => vec![(640, every(frame, 0, 2)), (320, every(frame, 1, 4)), (320, every(frame, 3, 4))],
        "GREY" => vec![luma(frame)],
        _ => anyhow::bail!("nobody has said where {format} has its samples"),
    })
}

/// The pixels that vivid moves its picture by from one frame to the next at "Move Left Slow" (`tpg_update_mv_step`).
const STEP: usize = 2;
/// After so many frames the picture is what it was.
const ROUND: usize = 640 / STEP;

/// The picture `frames` frames later, as a stream has it.
fn moved(planes: &[(usize, Vec<u8>)], frames: usize) -> Vec<u8> {
    let rows = planes.iter().flat_map(|(row, bytes)| {
        bytes
            .chunks_exact(*row)
            .map(move |bytes| (bytes, frames % ROUND * STEP * row / 640))
    });
    rows.flat_map(|(bytes, by)| [&bytes[by..], &bytes[..by]])
        .flatten()
        .copied()
        .collect()
}

/// Each frame is compared with what another program captures, and the picture moves: all frames differ, and one that is missing, too many
/// or in another's place is seen.
fn camera_by_ffmpeg() -> anyhow::Result<Outcome> {
    let ffmpeg = format!("ffmpeg -nostdin -v error -f yuv4mpegpipe -i - -f rawvideo -y {OUT}");
    // Planar: as it is. Others: their samples in another order, one copy.
    for (format, copied) in [("YU12", 0), ("YV12", 0), ("NV12", 640 * 540), ("YUYV", 640 * 720), ("GREY", 0)] {
        control("horizontal_movement=3")?;
        let picture = planes(format, &still(format, "")?)?;
        ensure!(moved(&picture, 1) != moved(&picture, 0), "{format}: a picture in which no movement can be seen");
        control("horizontal_movement=2")?;
        let options = format!("--from vivid --to y4m:- --format {format} --size 640x360 --fps 15 --frames 60");
        let result = through(&ffmpeg, &options)?;
        let decoded = fs::read(OUT)?;
        let bytes = picture.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
        ensure!(decoded.len() == 60 * bytes, "{format}: {} bytes", decoded.len());
        ensure!(number(&result, "bytes_copied")? == 60 * copied, "{format}: {result}");
        // How many frames of vivid's lie between two.
        let mut at = ROUND - 1;
        let mut steps = Vec::new();
        for (place, frame) in decoded.chunks_exact(bytes).enumerate() {
            let step = (1..=ROUND).find(|step| moved(&picture, at + step) == frame);
            let step = step.with_context(|| format!("{format}: frame {place} is none of vivid's"))?;
            at += step;
            steps.push(step);
        }
        // The first of vivid's shows the picture as it was captured, and those that are missing are those that were counted.
        let all = u64::try_from(steps.iter().sum::<usize>())?;
        let expected = 60 + number(&result, "frames/dropped_by_camera")?;
        note(&format!("{format}: 60 of {all} frames"));
        ensure!(all == expected, "{format}: {all} frames instead of {expected}, in steps of {steps:?}: {result}");
    }
    control("horizontal_movement=3")?;
    PASSED
}

/// `head` takes what it wants and goes: the stream ends, and that is no failure.
fn reader_goes() -> anyhow::Result<Outcome> {
    let before = State::read();
    for path in ["auto", "copy"] {
        sh(&format!(
            "{{ dmaflow pipe --json --from vivid --to raw:- --format NV12 --frames 1000 --path {path} 2>{RESULT}; \
             echo $? >/tmp/outputs.status; }} | head -c 3000000 >/dev/null"
        ))?;
        let status = fs::read_to_string("/tmp/outputs.status")?;
        let result = result()?;
        ensure!(status.trim() == "0", "{path}: status {status}, {result}");
        let presented = number(&result, "frames/presented")?;
        ensure!((1..100).contains(&presented), "{result}");
        before.is_back()?;
    }
    PASSED
}

/// The camera goes on while the reader sleeps; what does not fit is dropped by the camera and counted.
fn slow_reader() -> anyhow::Result<Outcome> {
    let frame = still("XR24", "")?;
    let options = "--from vivid --to raw:- --format XR24 --size 640x360 --fps 60 --frames 12";
    let result = through(
        &format!(
            "{{ for i in 1 2 3 4 5 6; do sleep 0.5; dd bs=921600 count=2 iflag=fullblock; done; }} >{OUT} 2>/dev/null"
        ),
        options,
    )?;
    is_all(OUT, &frame, 12)?;
    ensure!(number(&result, "frames/presented")? == 12 && number(&result, "bytes_copied")? == 0, "{result}");
    ensure!(number(&result, "frames/dropped_by_camera")? > 10, "{result}");
    PASSED
}

fn nobody_reads() -> anyhow::Result<Outcome> {
    let before = State::read();
    for path in ["auto", "copy"] {
        let mut command = dmaflow(&format!("pipe --json --from vivid --to raw:- --format XR24 --path {path}"));
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer).stderr(File::create(RESULT)?);
        let running = start_as_it_is(&mut command)?;
        drop(command);
        thread::sleep(Duration::from_millis(1500));
        let cpu = || fs::read_to_string(format!("/proc/{}/schedstat", running.pid()));
        let ran = |text: String| {
            text.split(' ')
                .next()
                .and_then(|ns| ns.parse::<u64>().ok())
                .context("schedstat")
        };
        let first = ran(cpu()?)?;
        thread::sleep(Duration::from_millis(500));
        let more = ran(cpu()?)? - first;
        ensure!(more < 100_000_000, "it ran {more} ns of 500 ms with nothing to do");
        let start = Instant::now();
        running.signal(Signal::SIGINT)?;
        running.end()?.has_status(0)?;
        ensure!(start.elapsed() < Duration::from_secs(10), "{:?} until it ended", start.elapsed());
        ensure!(number(&result()?, "frames/captured")? > 0, "{}", result()?);
        drop(reader);
        before.is_back()?;
    }
    PASSED
}

fn named_pipe() -> anyhow::Result<Outcome> {
    let frame = still("NV12", "")?;
    let fifo = "/tmp/outputs.fifo";
    let _ = fs::remove_file(fifo);
    sh(&format!("mkfifo {fifo}"))?;
    let mut command =
        dmaflow(&format!("pipe --json --from vivid --to raw:{fifo} --format NV12 --size 640x360 --frames 10"));
    let mut running = crate::process::start(&mut command)?;
    // It waits for its reader.
    thread::sleep(Duration::from_millis(500));
    ensure!(running.runs(), "it did not wait for a reader");
    let mut bytes = Vec::new();
    File::open(fifo)?.read_to_end(&mut bytes)?;
    let result = running.end()?.json(0)?;
    ensure!(number(&result, "bytes_copied")? == 0 && number(&result, "frames/presented")? == 10, "{result}");
    fs::write(OUT, bytes)?;
    is_all(OUT, &frame, 10)?;
    // And an order to stop ends that wait.
    let running = crate::process::start(&mut command)?;
    thread::sleep(Duration::from_millis(500));
    running.signal(Signal::SIGTERM)?;
    let result = running.end()?.json(0)?;
    ensure!(result.get("frames").is_none(), "frames that nobody read: {result}");
    fs::remove_file(fifo)?;
    PASSED
}

fn wrong_usage() -> anyhow::Result<Outcome> {
    for sink in ["raw:", "y4m:"] {
        finish(&mut dmaflow(&format!("pipe --from vivid --to {sink} --frames 1")))?.has_status(2)?;
    }
    let rgb = finish(&mut dmaflow("pipe --from vivid --to y4m:/tmp/outputs.y4m --format XR24 --frames 1"))?;
    rgb.one_line(1, &["XR24"])?;
    // What it recommends is what the stream takes as it is.
    let repaired = format!("pipe --from vivid --to y4m:{OUT} --format XR24 --frames 1 --path zero-copy");
    finish(&mut dmaflow(&repaired))?.one_line(3, &["XR24", "--format YU12"])?;
    let folder = finish(&mut dmaflow("pipe --from vivid --to raw:/tmp/no/such/file --frames 1"))?;
    folder.one_line(1, &["raw:/tmp/no/such/file"])?;
    let zero_copy = format!("pipe --from vivid --to raw:{OUT} --frames 1 --path zero-copy");
    finish(&mut dmaflow(&zero_copy))?.has_status(3)?;
    if Path::new("/dev/full").exists() {
        let full = finish(&mut dmaflow("pipe --from vivid --to raw:/dev/full --frames 1"))?;
        full.one_line(1, &["raw:/dev/full", "No space left"])?;
    }
    note(&format!("on Linux {}.{}", kernel().0, kernel().1));
    let mut terminal = Command::new("script");
    terminal.args(["-qec", "dmaflow pipe --from pattern --to raw:- --frames 1", "/dev/null"]);
    if crate::modules::has("script") {
        let run = finish(&mut terminal)?;
        ensure!(run.status.code() == Some(1) && run.stdout.contains("stdout is a terminal"), "{}", run.stdout);
    }
    PASSED
}
