//! `dmaflow snap`: one frame of a source, or what a display shows, as a PNG file.

use std::process::ExitCode;

use anyhow::{anyhow, bail};
use dmaflow::error::Kind;
use dmaflow::kms::{Card, Method, Snapshot};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::sink::{Png, write_png};

use crate::args::{SnapArgs, Via};
use crate::ends::open_source;
use crate::failure::Usage;
use crate::output::note;

pub fn run(args: &SnapArgs) -> anyhow::Result<ExitCode> {
    match find_display(&args.of)? {
        Some(card) => snap_display(args, &card),
        None if args.via.is_some() => bail!(Usage(format!("--via is for displays; {} is none", args.of))),
        None => snap_source(args),
    }
}

/// The display called `name`; `None` if that is a source.
fn find_display(name: &str) -> anyhow::Result<Option<Card>> {
    if name == "pattern" || name.starts_with("/dev/video") || name.starts_with("unix:") {
        return Ok(None);
    }
    match Card::find(name) {
        Ok(card) => Ok(Some(card)),
        Err(error) if name.starts_with("/dev/dri/") => Err(error.into()),
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Unsupported) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn snap_display(args: &SnapArgs, card: &Card) -> anyhow::Result<ExitCode> {
    let via = args.via.map(|via| match via {
        Via::Framebuffers => Method::Framebuffers,
        Via::Writeback => Method::Writeback,
    });
    let picture = Snapshot::take(card, via)?;
    for line in &picture.notes {
        note(line);
    }
    write_png(&args.file, picture.width, picture.height, &picture.rgb)?;
    note(&format!("{}x{} of {} by {}", picture.width, picture.height, card.info().path.display(), picture.method));
    Ok(ExitCode::SUCCESS)
}

fn snap_source(args: &SnapArgs) -> anyhow::Result<ExitCode> {
    let mut source = open_source(Some(&args.of), &args.shape, None, None)?;
    let mut png = Png::new(&args.file);
    let limits = Limits { frames: Some(1), duration: None };
    let pipe = Pipe::join(source.as_mut(), &mut png, Path::Auto, limits).map_err(|error| anyhow!(error))?;
    pipe.run(None, &mut |_| ())?;
    Ok(ExitCode::SUCCESS)
}
